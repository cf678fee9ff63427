"""Modules that train discrete flows: any one, and one that is made of five choices."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from dflows.bases import AutoregressiveBase, Base, FactorizedBase, NGramBase
from dflows.bijections import Bijection, RankPermutation
from dflows.checks import check_flow
from dflows.conditioner import Conditioner, Execution
from dflows.errors import UserError
from dflows.estimators import Estimator, LocalInTurn, LocalObjective
from dflows.flow import DiscreteFlow
from dflows.metrics import ExactMatch, LevelBits, ResidualEntropy
from dflows.ngrams import NGrams
from dflows.orderings import Ordering, alike
from dflows.reporting import Report
from dflows.transforms import ConditionalTransform
from lightning_modules.base import DEFAULT_OPTIMIZATION, BaseModule, Batch, Optimization, compute

__all__ = ["DiscreteFlowModule", "FlowModule"]

FIXED_POINTS = 4


def _shared_levels(flow: DiscreteFlow) -> Ordering | None:
    """Returns the one ordering of a flow, where levels of several dimensions are in it."""
    orderings = [transform.ordering for transform in flow.conditional_transforms]
    if isinstance(flow.base, AutoregressiveBase):
        orderings.append(flow.base.conditioner.ordering)
    found = [ordering.levels(flow.length) for ordering in orderings]
    if not found or any(not torch.equal(levels, found[0]) for levels in found):
        return None
    return orderings[0] if int(found[0].max()) + 1 < flow.length else None


def _grams(flow: DiscreteFlow) -> NGrams | None:
    """Returns the n-grams that a network is told of, where there are such.

    Raises:
        UserError: If they are of what flows make of the data, which changes while they learn.
    """
    *inner, outer = [flow.base, *flow.transforms]
    for part in inner:
        for module in part.modules():
            if isinstance(module, Conditioner) and module.grams is not None:
                raise UserError(
                    f"n-grams are added to the logits of a {type(part).__name__} that flows stand "
                    "on, and they are counted on the data: give them to the flow next to the data, "
                    "or to a base without flows"
                )
    found = [part.grams for part in outer.modules() if isinstance(part, Conditioner)]
    return next(filter(None, found), None)


def _turns(flow: DiscreteFlow) -> set[int | None]:
    """Returns of how many steps the turns are in which flows are trained."""
    estimators = [transform.estimator for transform in flow.conditional_transforms]
    return {part.steps for part in estimators if isinstance(part, LocalInTurn)}


def _optimization(flow: DiscreteFlow, optimization: Optimization) -> Optimization:
    """Makes the learning rate take its course once a turn, where flows share the training."""
    settles = optimization.schedule != "constant" or optimization.warmup_steps
    if _turns(flow) == {None} and optimization.cycles == 1 and settles:
        return replace(optimization, cycles=flow.turns)
    return optimization


class DiscreteFlowModule(BaseModule):
    """Creates a module that trains a discrete flow.

    Before a fit it starts the base from the counts of the training data, once in the life of its
    parameters, and runs :func:`dflows.checks.check_flow`. Testing finds the residual entropy of
    every flow as well, and, given a context, logs `test_accuracy`: the share of examples that
    :meth:`dflows.flow.DiscreteFlow.greedy` tells right, which is the mode on a factorized base.

    N-grams are counted where training begins: on the whole training split of a text, else on
    draws. An n-gram base under flows is counted on what they leave of training windows, and anew
    before every validation.

    Arguments:
        flow: The flow.
        optimization: Settings of the optimizer.
        base_refit_every: Where it is not 0, a factorized base is not trained by gradients, but set
            in closed form every so many steps, from running counts.
        base_refit_decay: What the counts are multiplied by before each further batch.
        base_count_windows: Training windows, or draws, on which an n-gram base is counted.

    Raises:
        UserError: If a base that is no factorized one is to be refitted, or nothing is left to
            train beside it; if n-grams are of what flows make of the data, or the base of a flow
            that takes a context; or a number is out of range.
    """

    takes_prompt = True
    started: Tensor
    base_counts: Tensor

    def __init__(
        self,
        flow: DiscreteFlow,
        optimization: Optimization = DEFAULT_OPTIMIZATION,
        base_refit_every: int = 0,
        base_refit_decay: float = 0.99,
        base_count_windows: int = 4096,
    ) -> None:
        super().__init__(_optimization(flow, optimization))
        if base_count_windows < 1:
            raise UserError(f"base_count_windows is {base_count_windows}: give at least 1")
        if base_refit_every < 0 or not 0 <= base_refit_decay < 1:
            raise UserError(
                f"base_refit_every is {base_refit_every} and base_refit_decay is "
                f"{base_refit_decay}: give at least 0 steps, and a factor from 0 to below 1"
            )
        self.flow = flow
        _grams(flow)
        if isinstance(flow.base, NGramBase) and self.conditional:
            raise UserError(
                "an NGramBase counts classes and knows nothing of a context, and the flows on it "
                "are given one: choose an AutoregressiveBase with context_features, or a "
                "FactorizedBase, or leave context_features away"
            )
        self.register_buffer("started", torch.tensor(False))
        self.base_refit_every = base_refit_every
        self.base_refit_decay = base_refit_decay
        self.base_count_windows = base_count_windows
        if base_refit_every:
            if not isinstance(flow.base, FactorizedBase):
                raise UserError(
                    f"base_refit_every is {base_refit_every}, and a {type(flow.base).__name__} has "
                    "no closed form: set it to 0, or choose FactorizedBase"
                )
            flow.base.requires_grad_(False)
            if not any(parameter.requires_grad for parameter in flow.parameters()):
                raise UserError(
                    f"base_refit_every is {base_refit_every}, and beside the base the model has "
                    "nothing to train: set it to 0, or give it flows"
                )
            counts = torch.zeros_like(flow.base.logits, dtype=torch.float64)
            self.register_buffer("base_counts", counts)
        orderings = [transform.ordering for transform in flow.conditional_transforms]
        self.residual_entropy = ResidualEntropy(
            len(flow.transforms), flow.num_classes, alike(orderings, flow.length)
        )
        self.residual_bpc: list[float] = []
        self._ordering = _shared_levels(flow)
        levels = None if self._ordering is None else self._ordering.levels(flow.length)
        self.level_bits = None if levels is None else LevelBits(levels)
        self.level_bpc: list[float] = []
        self.exact_match = ExactMatch()
        self.accuracy: float | None = None
        self._step_before = 0
        self._done = 0.0

    def objective(self, batch: Batch) -> Tensor:
        return self.flow.objective(self.indices_of(batch), self.context_of(batch))

    def log_prob(self, batch: Batch) -> Tensor:
        return self.flow.log_prob(self.indices_of(batch), self.context_of(batch))

    def sample(
        self,
        num_samples: int,
        *,
        length: int | None = None,
        temperature: float = 1.0,
        generator: Generator | None = None,
        method: Literal["levels", "fixed_point"] = "levels",
        context: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> Tensor:
        if context is not None and len(context) != num_samples:
            raise UserError(
                f"{num_samples} samples and {len(context)} contexts: give every sample its own"
            )
        return self.flow.sample(
            (num_samples,) if context is None else (),
            context,
            length=length,
            temperature=temperature,
            generator=generator,
            method=method,
            prompt=prompt,
        )

    @property
    def passes(self) -> int:
        return self.flow.passes

    @property
    def conditional(self) -> bool:
        """Whether some part of the flow takes a context."""
        return any(
            isinstance(module, Conditioner) and module.context is not None
            for module in self.flow.modules()
        )

    @property
    def evaluations(self) -> int:
        return sum(self.flow.evaluations)

    def accelerate(self, *, compile: bool = False, cuda_graph: bool = False) -> None:  # noqa: A002
        self.flow.accelerate(compile=compile, cuda_graph=cuda_graph)

    def report(self, split: str) -> Report:
        report = super().report(split)
        if split == "test" and self.accuracy is not None:
            report.metrics["accuracy"] = self.accuracy
            report.row("test, told exactly", f"{self.accuracy:.4f}", "share of examples")
        return report

    def report_structure(self) -> Report:
        flow = self.flow
        report = Report({"passes": flow.passes, "untransformed": flow.untransformed})
        if self.residual_bpc:
            report.metrics["residual_bpc"] = self.residual_bpc
            bits = ", ".join(f"{bits:.3f}" for bits in self.residual_bpc)
            report.row("entropy after each flow, bits", bits, "test, from data to base")
        if self.level_bpc and all(map(math.isfinite, self.level_bpc)):
            report.metrics["level_bpc"] = self.level_bpc
            bits = ", ".join(f"{bits:.2f}" for bits in self.level_bpc)
            report.row("bits of each level", bits, "test, in the order of generation")
        of = f"{flow.length} characters at once" if flow.passes else "no network"
        return report.row("passes to generate", str(flow.passes), of)

    def report_generation(self, length: int) -> Report:
        report = super().report_generation(length)
        if not self.flow.passes:
            return report
        context = self.example_contexts(1)
        generator = Generator(self.device).manual_seed(0)
        counts = []
        for _ in range(FIXED_POINTS):
            self.sample(1, context=context, generator=generator, method="fixed_point")
            counts.append(self.evaluations)
        mean = sum(counts) / len(counts)
        report.metrics["fixed_point_iterations"] = mean
        return report.row(
            "iterations of the fixed point", f"{mean:.4g}", f"1 sequence, mean of {FIXED_POINTS}"
        )

    def base_parameters(self) -> Iterable[nn.Parameter]:
        # Without flows the base is the model.
        return self.flow.base.parameters() if len(self.flow.transforms) else ()

    def _check_turns(self) -> None:
        """Refuses turns that do not fit the run.

        Raises:
            UserError: If flows are trained in turns of unequal length, or some never.
        """
        flows = self.flow.conditional_transforms
        steps = _turns(self.flow)
        if len(steps) > 1:
            raise UserError(
                f"turns are of {' and '.join(sorted(map(str, steps)))} steps: give every flow the "
                "same number, or none"
            )
        if None in steps and len(flows) > 1 and not self.has_end:
            raise UserError(
                "flows share the training in turn, and it has no end: set trainer.max_steps or "
                "trainer.max_time, or give LocalInTurn the steps of a turn"
            )
        most, turns = self.trainer.max_steps, self.flow.turns
        for length in filter(None, steps):
            if 0 <= most <= length * (turns - 1):
                raise UserError(
                    f"trainer.max_steps is {most}, and with turns of {length} steps the last of "
                    f"{turns} turns begins after {length * (turns - 1)}: give more steps, or "
                    "shorter turns"
                )

    def prepare(self) -> None:
        self._check_turns()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if _grams(self.flow) is not None and data.training_chunks() is None:
            raise UserError(
                f"a network is told of n-grams, and a {type(data).__name__} has no text to count "
                "them on: leave ngram_order away"
            )
        if not self.started:
            self.flow.start(data.class_counts())
            self.started.fill_(True)
        batch = next(iter(data.train_dataloader())) if self.conditional else None
        context = None if batch is None else self.context_of(batch)
        check_flow(self.flow, context)
        rank_zero_info(self.describe())

    def describe(self) -> str:
        """Returns what the model is, in a line."""
        flow = self.flow
        parts = [
            f"{type(flow.base).__name__}, {flow.length} dimensions of {flow.num_classes} classes",
            f"{flow.passes} passes to generate",
            f"{sum(parameter.numel() for parameter in self.parameters()):,} parameters",
        ]
        if number := len(flow.transforms):
            transforms = f"{number} transform{'s' if number > 1 else ''}"
            parts[0] = f"{transforms} on {parts[0]}"
            parts.insert(1, f"{flow.untransformed} dimensions are never transformed")
        return ", ".join(parts)

    def on_train_start(self) -> None:
        """Counts n-grams that have not been counted: those that a network is told of first."""
        base, grams = self.flow.base, _grams(self.flow)
        if grams is not None and not grams.num_counted:
            self._count(grams, left=False)
        if isinstance(base, NGramBase) and not base.num_counted:
            self._count(base.grams, left=len(self.flow.transforms) > 0)

    def on_validation_start(self) -> None:
        """Counts an n-gram base on what the flows have come to leave."""
        base, trainer = self.flow.base, self.trainer
        training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if training and isinstance(base, NGramBase) and len(self.flow.transforms):
            self._count(base.grams, left=True)

    def _count(self, grams: NGrams, left: bool) -> None:
        """Counts the training split, or what flows have left of it."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        text = None if left else data.training_chunks()
        with torch.inference_mode(mode=False):
            grams.count(self._training_rows(data) if text is None else text)
        if isinstance(self.flow.base, NGramBase) and not len(self.flow.transforms):
            self.characters_read = grams.num_counted
        rank_zero_info(f"{grams}, counted on {grams.num_counted:,} characters")

    def _training_rows(self, data: Any) -> Iterator[Tensor]:
        """Yields what the flows leave of the first training windows."""
        read, step = data.training_stream().open(), data.eval_batch_size
        for first in range(0, self.base_count_windows, step):
            rows = read(first, min(step, self.base_count_windows - first))
            batch = data.batch_of(torch.from_numpy(rows.astype("int64")).to(self.device))
            yield self._left(batch)

    def _left(self, batch: Batch) -> Tensor:
        """Returns what the flows leave of training data, to which they are as to unseen data."""
        y, context = self.indices_of(batch), self.context_of(batch)
        if not len(self.flow.transforms):
            return y
        with self.flow.without_own(True):
            return self.flow.residuals(y, context)[-1]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Notes the step, of accumulated batches only the last makes one, and how much is done."""
        super().on_train_batch_start(batch, batch_idx)
        self._step_before = self.trainer.global_step
        self._done = self.progress(self._step_before)
        self.flow.at_step(self._step_before, self._done)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keeps flows still whose turn it is not."""
        super().on_before_optimizer_step(optimizer)
        for transform in self.flow.waiting:
            for parameter in transform.parameters():
                parameter.grad = None

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        """Refits the base, unless it is held."""
        step = self.trainer.global_step
        base = self.flow.base
        if not self.base_refit_every or step == self._step_before or step % self.base_refit_every:
            return
        if step <= self.optimization.hold_base_steps:
            return
        if isinstance(base, FactorizedBase):
            counts = base.count(self._left(batch))
            counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
            self.base_counts = self.base_counts * self.base_refit_decay + counts
            base.refit(self.base_counts)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the test metrics, those of every flow included."""
        with self.located("test"):
            self._test(batch)

    def _test(self, batch: Batch) -> None:
        y, context = self.indices_of(batch), self.context_of(batch)
        if self.conditional:
            self.exact_match.update(self.flow.greedy(context, length=y.shape[-1]), y)
        # The last of the residuals is x, whose likelihood under the base is that of y.
        residuals = self.flow.residuals(y, context)
        x = residuals[-1] if residuals else y
        log_prob = self.flow.base.log_prob(x, self.flow.encode_context(context))
        if residuals:
            self.residual_entropy.update(residuals)
        if self._ordering is not None and self.level_bits is not None:
            self.level_bits.update(log_prob, self._ordering.levels(log_prob.shape[1]))
        self._update("test", batch, log_prob.sum(dim=-1))

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics, which all processes compute together."""
        super().on_test_epoch_end()
        if len(self.flow.transforms):
            self.residual_bpc = compute(self.residual_entropy).reshape(-1).tolist()
            self.residual_entropy.reset()
        if self.level_bits is not None:
            self.level_bpc = compute(self.level_bits).tolist()
            self.level_bits.reset()
        if self.conditional:
            accuracy = compute(self.exact_match)
            self.accuracy = float(accuracy)
            self.log("test_accuracy", accuracy.float(), prog_bar=True, sync_dist=True)
            self.exact_match.reset()


class FlowModule(DiscreteFlowModule):
    """Creates a flow from five choices, a key each, and trains it.

    Arguments:
        num_classes: K; taken from the data where a command builds the module.
        length: D; likewise.
        orderings: Which dimensions condition which: one a flow, in the order base → data.
        backbone: The network: called once a flow without arguments, or once for all.
        bijection: What is done to one variable: called with K.
        estimator: How learning passes the discrete choice. By default the local objective, of
            one flow after the other (:class:`dflows.estimators.LocalInTurn`) where there are
            several that do not share a network.
        base: The distribution of x: called with K, D and the orderings.
        share_backbone: Whether all flows share one network; embeddings and heads are their own.
        width: Features of one dimension, where the backbone does not tell its own.
        execution: How the backbone is run: ``causal``, ``masked``, or ``auto``.
        positions: Whether a learned embedding of positions is added.
        context_encoder: Maps what the data are conditioned on to vectors (B, C) or sequences
            (B, S, C).
        context_features: C, of a conditional flow.
        align_context: Whether position d of the context belongs to dimension d. A base that is
            conditional too is told so by options of its own.
        optimization: Settings of the optimizer.
        ngram_order: Classes of the longest of the n-grams whose log-probabilities the network of
            the flow next to the data is told; none where it is not given.
        base_refit_every: As in :class:`DiscreteFlowModule`.
        base_refit_decay: Likewise.
        base_count_windows: Likewise.

    Raises:
        UserError: If the choices do not fit each other.

    Example:
        >>> from functools import partial
        >>> from dflows.backbones import DilatedConvolution
        >>> from dflows.orderings import Strided
        >>> module = FlowModule(27, 16, [Strided(4)], partial(DilatedConvolution, width=8))
        >>> module.flow.passes
        3
    """

    def __init__(
        self,
        num_classes: int,
        length: int,
        orderings: list[Ordering],
        backbone: Callable[[], nn.Module],
        bijection: Callable[[int], Bijection] = RankPermutation,
        estimator: Callable[[], Estimator] | None = None,
        base: Callable[[int, int, Sequence[Ordering]], Base] = FactorizedBase,
        *,
        share_backbone: bool = False,
        width: int | None = None,
        execution: Execution = "auto",
        positions: bool | None = None,
        context_encoder: nn.Module | None = None,
        context_features: int | None = None,
        align_context: bool = False,
        ngram_order: int | None = None,
        optimization: Optimization = DEFAULT_OPTIMIZATION,
        base_refit_every: int = 0,
        base_refit_decay: float = 0.99,
        base_count_windows: int = 4096,
    ) -> None:
        shared = backbone() if share_backbone else None
        in_turn = len(orderings) > 1 and not share_backbone
        estimator = estimator or (LocalInTurn if in_turn else LocalObjective)
        grams = None if ngram_order is None else NGrams(num_classes, ngram_order)
        if grams is not None and not orderings:
            raise UserError(
                f"ngram_order is {ngram_order}, and there is no flow that could be told: give "
                "orderings, or leave it away"
            )
        transforms = [
            ConditionalTransform(
                length,
                bijection(num_classes),
                ordering,
                backbone() if shared is None else shared,
                estimator(),
                width=width,
                execution=execution,
                positions=positions,
                context_features=context_features,
                align_context=align_context,
                grams=grams if number == len(orderings) else None,
            )
            for number, ordering in enumerate(orderings, start=1)
        ]
        flow = DiscreteFlow(base(num_classes, length, orderings), transforms, context_encoder)
        super().__init__(flow, optimization, base_refit_every, base_refit_decay, base_count_windows)
