"""The module that trains a discrete flow."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from dflows.bases import Base
from dflows.checks import check_flow
from dflows.errors import UserError
from dflows.experts import Expert
from dflows.flow import DiscreteFlow
from dflows.metrics import ExactMatch, LevelBits, ResidualEntropy
from dflows.objectives import EndToEnd, Layerwise, Local, Objective, RandomOrderings
from dflows.orderings import Ordering, alike
from dflows.reporting import Report
from dflows.representations import exactly
from dflows.transforms import DiscreteTransform
from lightning_modules.base import DEFAULT_OPTIMIZATION, BaseModule, Batch, Optimization, compute
from lightning_modules.counting import Counting, unseen_residual
from lightning_modules.passes import PassesCurve
from lightning_modules.refit import ClosedFormRefit
from lightning_modules.sharding import whole

__all__ = ["FlowModule"]

FIXED_POINTS = 4
FINE = 128


def default_objective(flow: DiscreteFlow) -> Objective:
    """Returns the objective that trains a flow well.

    It is the likelihood of a base alone, over random orderings where it serves all; the local
    objective of a single transform; and layerwise training of several, unless they share a network.
    """
    conditional = flow.conditional_transforms
    if not conditional:
        return RandomOrderings() if flow.base.any_order else EndToEnd()
    networks = {id(transform.conditioner.backbone) for transform in conditional}
    layerwise = 1 < len(conditional) == len(networks)
    return Layerwise() if layerwise else Local()


def _shared_levels(flow: DiscreteFlow) -> Ordering | None:
    """Returns the one ordering of a flow, where levels of several dimensions are in it."""
    parts: list[DiscreteTransform | Base] = [*flow.transforms, flow.base]
    orderings = [part.ordering for part in parts if part.ordering is not None]
    found = [ordering.levels(flow.length) for ordering in orderings]
    if not found or any(not torch.equal(levels, found[0]) for levels in found):
        return None
    return orderings[0] if int(found[0].max()) + 1 < flow.length else None


class FlowModule(BaseModule):
    """Creates a module that trains a discrete flow.

    Before a fit it initialises the base from the counts of the training data, once in the life of
    its parameters, and runs :func:`dflows.checks.check_flow`. Testing finds the residual entropy of
    every transform as well, and, given a context, logs `test_accuracy`: the share of examples that
    :meth:`dflows.DiscreteFlow.greedy` tells right, which is the mode on a factorized base.

    N-grams are counted where training begins: those of an expert on the training split; those of a
    base under transforms on what these leave of training data, again before every validation.

    Args:
        flow: The flow.
        objective: What training maximises. By default the local objective, layerwise where there
            are several transforms that do not share a network; the likelihood of a base alone.
        optimization: Settings of the optimizer.
        base_refit_every: Where it is not 0, the base is not trained by gradients, but set in closed
            form every so many steps, from running counts.
        base_refit_decay: What the counts are multiplied by before each further batch.
        base_count_windows: Training windows, or draws, on which an n-gram base is counted.

    Raises:
        UserError: If the objective cannot train the flow; if the base to refit has no closed form,
        or
            is all there is to train; if n-grams would be counted on transformed data, or are the
            base of a flow that takes a context; or a number is out of range.

    Example:
        >>> from dflows import flows
        >>> module = FlowModule(flows.strided(num_classes=27, length=16, columns=4))
        >>> module.passes
        3
    """

    takes_prompt = True
    takes_draft = True
    initialised: Tensor

    def __init__(
        self,
        flow: DiscreteFlow,
        objective: Objective | None = None,
        optimization: Optimization = DEFAULT_OPTIMIZATION,
        base_refit_every: int = 0,
        base_refit_decay: float = 0.99,
        base_count_windows: int = 4096,
    ) -> None:
        objective = objective or default_objective(flow)
        objective.prepare(flow)
        settles = optimization.schedule != "constant" or optimization.warmup_steps
        if (stages := objective.num_stages(flow)) > 1 and optimization.cycles == 1 and settles:
            optimization = replace(optimization, cycles=stages)
        super().__init__(optimization)
        self.flow = flow
        self.objective = objective
        self.register_buffer("initialised", torch.tensor(False))
        self.counting = Counting(flow, base_count_windows)
        refits = base_refit_every != 0
        self.base_refit = (
            ClosedFormRefit(flow, base_refit_every, base_refit_decay) if refits else None
        )
        orderings = [transform.ordering for transform in flow.conditional_transforms]
        self.residual_entropy = ResidualEntropy(
            len(flow.transforms), flow.num_classes, alike(orderings, flow.length)
        )
        self._measure_levels()
        self.curve = PassesCurve(objective.choices) if objective.choices else None
        self.exact_match = ExactMatch()
        self.accuracy: float | None = None
        self.residual_bpc: list[float] = []
        self.level_bpc: list[float] = []
        self._step_before = 0
        self._done: float | None = 0.0
        self._certified = False

    def evaluate_objective(self, batch: Batch) -> Tensor:
        value: Tensor = self.objective(
            self.flow, self.indices_of(batch), self.context_of(batch), self._done
        )
        return value

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
        draft: Base | None = None,
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
            draft=draft,
        )

    @property
    def passes(self) -> int:
        return self.flow.passes

    def resize(self, *, passes: int | None = None, length: int | None = None) -> None:
        flow = self.flow if length is None else self.flow.with_length(length)
        self.flow = flow if passes is None else flow.with_passes(passes)
        self._measure_levels()

    def _measure_levels(self) -> None:
        self._ordering = _shared_levels(self.flow)
        levels = None if self._ordering is None else self._ordering.levels(self.flow.length)
        self.level_bits = None if levels is None else LevelBits(levels).to(self.device)

    @property
    def conditional(self) -> bool:
        """Whether some part of the flow takes a context."""
        return self.flow.takes_context

    @property
    def evaluations(self) -> int:
        return sum(self.flow.evaluations)

    def accelerate(self, *, compile: bool = False, cuda_graph: bool = False) -> None:  # noqa: A002
        self.flow.accelerate(compile=compile, cuda_graph=cuda_graph)

    def report(self, split: str) -> Report:
        report = super().report(split)
        if split == "test" and self.accuracy is not None:
            report.metrics["accuracy"] = self.accuracy
            report.row("test, predicted exactly", f"{self.accuracy:.4f}", "share of examples")
        return report

    def report_structure(self) -> Report:
        flow = self.flow
        report = Report({"passes": flow.passes, "untransformed": flow.untransformed})
        if self.residual_bpc:
            report.metrics["residual_bpc"] = self.residual_bpc
            bits = ", ".join(f"{bits:.3f}" for bits in self.residual_bpc)
            report.row("entropy after each transform, bits", bits, "test, from data to base")
        if self.level_bpc and all(map(math.isfinite, self.level_bpc)):
            report.metrics["level_bpc"] = self.level_bpc
            bits = ", ".join(f"{bits:.2f}" for bits in self.level_bpc)
            report.row("bits of each level", bits, "test, in the order of generation")
        if self.curve is not None:
            report += self.curve.report()
        of = f"{flow.length} characters at once" if flow.passes else "no network"
        return report.row("passes to generate", str(flow.passes), of)

    def report_generation(self, length: int) -> Report:
        report = super().report_generation(length)
        if self.curve is not None:
            report += self.curve.report_seconds(self.flow, report.metrics["generation_seconds_1"])
        if not self.flow.passes or self.curve is not None:
            return report  # who may choose few passes needs no iterations
        context = self.example_contexts(1)
        generator = Generator(self.device).manual_seed(0)
        counts = []
        for _ in range(FIXED_POINTS):
            self.sample(1, context=context, generator=generator, method="fixed_point")
            counts.append(self.evaluations)
        mean = sum(counts) / len(counts)
        report.metrics["fixed_point_iterations"] = mean
        remark = f"1 sequence, mean of {FIXED_POINTS}"
        experts = [part for part in self.flow.base.modules() if isinstance(part, Expert)]
        if any(expert.drafter(torch.empty(1, 1)) is not None for expert in experts):
            remark += ", drafted by the expert"
        return report.row("iterations of the fixed point", f"{mean:.4g}", remark)

    def base_parameters(self) -> Iterable[nn.Parameter]:
        # Without transforms the base is the model.
        return self.flow.base.parameters() if len(self.flow.transforms) else ()

    def prepare(self) -> None:
        # An objective of stages needs the progress, and says so.
        self.objective.frozen(self.flow, 0.0 if self.has_end else None)
        if (epochs := self.coarse_epochs) is not None and self._skips_stages(epochs):
            raise UserError(
                f"{type(self.objective).__name__} trains in stages, and {epochs} epochs of no "
                "known length would leave some out: set trainer.max_steps, max_time or "
                "limit_train_batches, or more epochs"
            )
        if not self.initialised:
            counts = self.data.class_counts(self.flow.num_classes)
            if counts is not None:
                self.flow.base.init_from_counts(counts)
            self.initialised.fill_(True)
        self._certified = False
        rank_zero_info(self.describe())

    def _skips_stages(self, epochs: int) -> bool:
        """Says whether some parameters would not have their stage if it changed with epochs."""
        objective, flow = self.objective, self.flow

        def stages(count: int) -> set[tuple[bool, frozenset[int]]]:
            parts = [number / count for number in range(count)]
            return {
                (objective.end_to_end(part), frozenset(map(id, objective.frozen(flow, part))))
                for part in parts
            }

        return epochs < objective.num_stages(flow) or not stages(FINE) <= stages(epochs)

    def on_fit_start(self) -> None:
        """Certifies the flow where it is trained, on its device."""
        super().on_fit_start()
        if (batch := self._first_batch()) is not None:
            self._certify_untrained(batch)

    def _first_batch(self) -> Batch | None:
        """Returns the first training batch, unless reading it would take it from the training."""
        found = self.data.first_batch()
        return None if found is None else [part for part in found if part is not None]

    def _certify_untrained(self, batch: Batch) -> None:
        with whole(self):
            self.certify(batch, trained=False)
        self._certified = True

    def certify(self, batch: Batch | None = None, *, trained: bool = True) -> None:
        """Shows that the flow is what its likelihood presumes: :func:`dflows.checks.check_flow`.

        It does so as the trainer evaluates: in full precision, or in that of its weights.

        Args:
            batch: Examples; the first of the training data where they are not given.
            trained: Whether the weights are to be taken as they are.

        Raises:
            CertificateError: If it is not.
        """
        batch = self._first_batch() if batch is None else batch
        y = context = None
        if batch is not None:
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            y, context = self.indices_of(batch), self.context_of(batch)
        precision = None if self._trainer is None else self.trainer.precision_plugin
        with nullcontext() if precision is None else precision.forward_context():
            check_flow(self.flow, context, batch=y, trained=trained)
            for passes in {*self.objective.choices} - {self.passes}:
                flow = self.flow.with_passes(passes)
                check_flow(flow, context, batch=y, trained=trained, shorter=False)

    def describe(self) -> str:
        """Returns what the model is, in a line."""
        flow = self.flow
        parts = [
            f"{type(flow.base).__name__}, {flow.length} dimensions of {flow.classes} classes",
            f"{flow.passes} passes to generate",
            f"{sum(parameter.numel() for parameter in self.parameters()):,} parameters",
        ]
        if number := len(flow.transforms):
            transforms = f"{number} transform{'s' if number > 1 else ''}"
            parts[0] = f"{transforms} on {parts[0]}"
            parts.insert(1, f"{flow.untransformed} dimensions are never transformed")
        return ", ".join(parts)

    def on_train_start(self) -> None:
        """Counts what has not been counted."""
        number = self.counting.begin(self.data)
        if number and not any(True for _ in self.flow.parameters()):
            self.characters_read = number

    def on_validation_start(self) -> None:
        """Counts a base on what the transforms have come to leave."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            with self.located("the counts of the base"):
                self.counting.again(self.data)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Notes the step, of accumulated batches only the last makes one, and how much is done."""
        super().on_train_batch_start(batch, batch_idx)
        if not self._certified:  # the data can be iterated once only
            self._certify_untrained(batch)
        self._step_before = self.trainer.global_step
        self._done = self.progress(self._step_before) if self.has_end else None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keeps still what does not learn in this stage."""
        super().on_before_optimizer_step(optimizer)
        for parameter in self.objective.frozen(self.flow, self._done):
            parameter.grad = None

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        """Refits the base, unless it is held."""
        step, refit = self.trainer.global_step, self.base_refit
        if refit is None or step == self._step_before or step % refit.every:
            return
        if step > self.optimization.hold_base_steps:
            with whole(self), self.located("the refit of the base"):
                x = unseen_residual(self.flow, self.indices_of(batch), self.context_of(batch))
                counts = self.trainer.strategy.reduce(refit.count(self.flow, x), reduce_op="sum")
                refit.update(self.flow, counts)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the test metrics, those of every transform included."""
        with self.located("test"):
            self._test(batch)

    def _test(self, batch: Batch) -> None:
        y, context = self.indices_of(batch), self.context_of(batch)
        if self.conditional:
            self.exact_match.update(self.flow.greedy(context, length=y.shape[-1]), y)
        # The last of the residuals is x, whose likelihood under the base is that of y.
        residuals = self.flow.residuals(y, context)
        x = residuals[-1] if residuals else y
        with exactly(y.device):
            log_prob = self.flow.base.log_prob(x, self.flow.encode_context(context))
        if residuals:
            self.residual_entropy.update(residuals)
        scores = log_prob.sum(dim=-1)
        if self.curve is not None:
            self.curve.update(self.flow, y, context, scores)
        if self._ordering is not None and self.level_bits is not None:
            self.level_bits.update(log_prob, self._ordering.levels(log_prob.shape[1]))
        self._update("test", batch, scores)

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics, which all processes compute together."""
        super().on_test_epoch_end()
        if len(self.flow.transforms):
            self.residual_bpc = compute(self.residual_entropy).reshape(-1).tolist()
            self.residual_entropy.reset()
        if self.level_bits is not None:
            self.level_bpc = compute(self.level_bits).tolist()
            self.level_bits.reset()
        if self.curve is not None:
            self.curve.compute()
        if self.conditional:
            accuracy = compute(self.exact_match)
            self.accuracy = float(accuracy)
            self.log("test_accuracy", accuracy.float(), prog_bar=True, sync_dist=True)
            self.exact_match.reset()
