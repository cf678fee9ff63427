"""What all modules share: steps, likelihood metrics, optimizer and schedule, exact resume."""

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
from pytorch_lightning.callbacks import Callback
from torch import Generator, Tensor, nn
from torchmetrics import Metric

from dflows.acceleration import compiling
from dflows.errors import NonFiniteError, UserError
from dflows.metrics import BitsPerCharacter, NatsPerExample
from dflows.reporting import Report, Score
from lightning_modules.checkpoints import load_weights, match_precision, read_content, rebuild
from lightning_modules.data import DataFacts, unpack
from lightning_modules.estimates import check_batch
from lightning_modules.optimization import DEFAULT_OPTIMIZATION, Optimization
from lightning_modules.optimized import OptimizedModule
from lightning_modules.processes import SharedBuffers, mean_of_processes
from lightning_modules.timing import report_generation

__all__ = ["DEFAULT_OPTIMIZATION", "BaseModule", "Batch", "Method", "Optimization", "compute"]

Batch: TypeAlias = Tensor | Sequence[Tensor]
"""Indices (B, d) alone, or in a list; or indices and what they are conditioned on (B, …)."""

Method: TypeAlias = Literal["levels", "fixed_point"]
"""How events are generated: level by level, or all levels at once until nothing changes."""

SMOOTHING = 0.98
EXAMPLES = 32


class BaseModule(OptimizedModule, ABC):
    """Base class of modules that are trained on an objective and judged by likelihoods.

    A subclass says what the objective, the likelihood and a sample are; steps, metrics, optimizer,
    schedule and resume are here. It logs `train_bpc` (smoothed), `valid_bpc`, `valid_nats`,
    `test_bpc` and `test_nats`: bits per character count all dimensions of an example as characters,
    nats are those of a whole example.

    Randomness in a training step depends on the seed, the process and the number of the batch
    alone, so that a resumed run repeats the uninterrupted one. A loss, gradients or a likelihood
    that are not finite end the run by a :class:`dflows.errors.NonFiniteError`, and no checkpoint
    is written after them.

    Args:
        optimization: Settings of the optimizer.

    Attributes:
        likelihood: Whether the likelihoods are ``exact``, or a ``bound`` that they do not reach.
            Tables and records say which.
        takes_prompt: Whether :meth:`sample` takes a `prompt`.
        takes_draft: Whether it takes a `draft`.
        scores: The likelihood of each split that was evaluated last.
        characters_read: Characters that the model learned from, where they were not read as
            training batches.
    """

    likelihood: ClassVar[Literal["exact", "bound"]] = "exact"
    takes_prompt: ClassVar[bool] = False
    takes_draft: ClassVar[bool] = False

    def __init__(self, optimization: Optimization = DEFAULT_OPTIMIZATION) -> None:
        super().__init__(optimization)
        self.metrics = nn.ModuleDict(
            {
                split: nn.ModuleDict({"bpc": BitsPerCharacter(), "nats": NatsPerExample()})
                for split in ("valid", "test")
            }
        )
        self.scores: dict[str, Score] = {}
        self.characters_read: int | None = None
        self._contexts: Tensor | None = None
        self._smoothed: Tensor | None = None
        self._seed = 0
        self._before: tuple[int, dict[str, Any]] = (0, {})

    @abstractmethod
    def evaluate_objective(self, batch: Batch) -> Tensor:
        """Computes what training maximises, (B,), in nats: the log-likelihood, or an estimate."""

    @abstractmethod
    def log_prob(self, batch: Batch) -> Tensor:
        """Computes the log-likelihood (B,), in nats, or the bound on it."""

    @abstractmethod
    def sample(
        self,
        num_samples: int,
        *,
        length: int | None = None,
        temperature: float = 1.0,
        generator: Generator | None = None,
        method: Method = "levels",
        context: Tensor | None = None,
    ) -> Tensor:
        """Draws indices (num_samples, length), each given a context of its own or all none."""

    @property
    def passes(self) -> int | None:
        """Sequential network evaluations that drawing a batch takes, where they are known."""
        return None

    def resize(self, *, passes: int | None = None, length: int | None = None) -> None:
        """Sets the number of passes, or the length of an event, where the model leaves the choice.

        Args:
            passes: Sequential network evaluations that drawing a batch takes.
            length: The largest number of dimensions, D.

        Raises:
            UserError: If the model cannot have them.
        """
        if passes is None and length is None:
            return
        what = f"passes is {passes}" if passes is not None else f"length is {length}"
        raise UserError(
            f"{what}, and a {type(self).__name__} leaves no choice: leave it away, or train a flow "
            "over lanes"
        )

    @property
    def conditional(self) -> bool:
        """Whether the model takes a context."""
        return False

    @property
    def evaluations(self) -> int | None:
        """Network evaluations that the last batch of samples took, where they were counted."""
        return None

    def accelerate(self, *, compile: bool = False, cuda_graph: bool = False) -> None:  # noqa: A002
        """Makes generation faster, where there are ways to choose from.

        Raises:
            UserError: If there are none.
        """
        if compile or cuda_graph:
            raise UserError(
                f"{'compile' if compile else 'cuda_graph'} is set, and a {type(self).__name__} is "
                "computed in one way: leave it away"
            )

    def prepare(self) -> None:
        """Initialises and checks the model once the data are known, before a fit; a hook."""

    def certify(self, batch: Batch | None = None, *, trained: bool = True) -> None:
        """Checks the model before a figure of it is recorded; a hook.

        Args:
            batch: One of the batches that will be scored, on the device of the module.
            trained: Whether the weights are to be taken as they are.

        Raises:
            CertificateError: If the model keeps no promise of its likelihoods.
        """

    @property
    def data(self) -> DataFacts:
        """What is known of the data that the trainer has."""
        return DataFacts(self.trainer)

    def report(self, split: str) -> Report:
        """Reports the likelihood of a split that was evaluated."""
        score = self.scores[split]
        remark = f"{score.characters:,} characters, {self.likelihood}"
        return Report(
            {
                "characters": {split: score.characters},
                "examples": {split: score.examples},
                f"{split}_bpc": score.bpc,
                f"{split}_nats": score.nats,
            }
        ).row(f"{split}, bits per character", f"{score.bpc:.4f}", remark)

    def report_structure(self) -> Report:
        """Reports what the model is, and what testing found of its parts."""
        if self.passes is None:
            return Report()
        return Report({"passes": self.passes}).row(
            "passes to generate", str(self.passes), "a whole window"
        )

    def report_generation(self, length: int) -> Report:
        """Times generation and reports the latencies.

        Args:
            length: Dimensions of a sample.
        """
        return report_generation(self, length, self.example_contexts(EXAMPLES))

    def example_contexts(self, number: int) -> Tensor | None:
        """Returns so many contexts of the first test batch to sample with, if there were any."""
        if self._contexts is None or not self.conditional:
            return None
        return self._contexts[torch.arange(number) % len(self._contexts)].to(self.device)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = None,
        *,
        allow: Sequence[str] = (),
        strict: bool = True,
        **arguments: Any,
    ) -> Self:
        """Makes the module of a checkpoint, without running any code that is in the file.

        A checkpoint of `python -m dflows.fit` says how its module is made. One of a
        `pl.Trainer` does so as far as the module called `save_hyperparameters`; what its
        constructor takes otherwise must be given.

        Args:
            checkpoint_path: The file.
            map_location: Where the module goes, as `torch.load` takes it; by default the CPU.
            allow: Packages, other than dflows' own, whose classes a checkpoint may name.
            strict: Whether all weights must be there, and no others.
            arguments: Arguments of the constructor.

        Returns:
            The module, as its constructor makes it: in training mode.

        Raises:
            UserError: If the file is no checkpoint, does not say how its module is made, or its
                weights do not fit.

        Example:
            >>> module = FlowModule.load_from_checkpoint("best.ckpt", flow=flow)  # doctest: +SKIP
        """
        arguments.pop("weights_only", None)  # no other objects are ever read
        content = read_content(checkpoint_path, map_location or "cpu")
        module = rebuild(cls, content, checkpoint_path, allow, arguments)
        match_precision(module, content["state_dict"])
        load_weights(module, content["state_dict"], checkpoint_path, strict=strict)
        module.on_load_checkpoint(content)
        weight = next(iter(content["state_dict"].values()), None)
        return module if weight is None else module.to(weight.device)

    @staticmethod
    def indices_of(batch: Batch) -> Tensor:
        """Returns the indices (B, d) of a batch."""
        return unpack(batch)[0]

    @staticmethod
    def context_of(batch: Batch) -> Tensor | None:
        """Returns what the indices of a batch are conditioned on, or nothing."""
        return unpack(batch)[1]

    def setup(self, stage: str) -> None:
        """Prepares a fit.

        Raises:
            UserError: If it has no steps, or a batch takes more than the memory.
        """
        super().setup(stage)
        if stage == "fit":
            check_batch(self, self.data)
            self._seed = torch.initial_seed()
            with torch.random.fork_rng(devices=[]):
                self.prepare()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds what is drawn in this step."""
        super().on_train_batch_start(batch, batch_idx)
        trainer = self.trainer
        self._before = (trainer.fit_loop.total_batch_idx, self.training_state())
        draw = trainer.fit_loop.total_batch_idx * trainer.world_size + trainer.global_rank + 1
        torch.manual_seed((self._seed + 0x9E3779B97F4A7C15 * draw) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Returns the loss: nats per dimension, so that learning rates do not depend on D.

        Raises:
            NonFiniteError: If it is not finite.
        """
        try:
            with self.located("training"), compiling(self.optimization.compile):
                loss = -self.evaluate_objective(batch).mean() / self.indices_of(batch).shape[-1]
                self._check_loss(loss.detach())
        except NonFiniteError:
            if not self._in_range_test():
                raise
            self.trainer.should_stop = True
            return None
        bits = mean_of_processes(loss.detach().float()) / math.log(2)
        smoothed = bits if self._smoothed is None else self._smoothed.to(bits.device)
        self._smoothed = smoothed.lerp(bits, 1 - SMOOTHING)
        self.log("train_bpc", self._smoothed, prog_bar=True)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Computes gradients, where there is anything to train by them."""
        if loss.requires_grad:
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the validation metrics."""
        with self.located("validation"):
            self._update("valid", batch, self.log_prob(batch))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the test metrics."""
        with self.located("test"):
            self._update("test", batch, self.log_prob(batch))

    def configure_callbacks(self) -> list[Callback]:
        """Returns what every trainer of the module needs."""
        attached = any(isinstance(entry, SharedBuffers) for entry in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if attached else [SharedBuffers()]

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics, which all processes compute together."""
        self._log_metrics("valid")

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics, which all processes compute together."""
        self._log_metrics("test")

    def _update(self, split: str, batch: Batch, log_prob: Tensor) -> None:
        metrics = self.metrics[split]
        metrics["bpc"].update(log_prob, self.indices_of(batch).numel())  # type: ignore[index]
        metrics["nats"].update(log_prob)  # type: ignore[index]
        if split == "test" and self._contexts is None and self.conditional:
            context = self.context_of(batch)
            self._contexts = None if context is None else context[:EXAMPLES].detach()

    def _log_metrics(self, split: str) -> None:
        """Logs the likelihoods of a split.

        Raises:
            NonFiniteError: If they are not finite.
        """
        metrics = self.metrics[split]
        values = {name: compute(metric) for name, metric in metrics.items()}  # type: ignore[operator]
        score = Score(
            split,
            bpc=float(values["bpc"]),
            characters=self._total(metrics["bpc"].num_characters),  # type: ignore[index]
            examples=self._total(metrics["nats"].num_examples),  # type: ignore[index]
            standard_error=float(metrics["nats"].standard_error()),  # type: ignore[index]
        )
        for metric in metrics.values():  # type: ignore[operator]
            metric.reset()
        if not math.isfinite(score.bpc):
            raise NonFiniteError(
                f"the {split} likelihood at step {self._step()} is {score.bpc} bits per character: "
                "the training diverged, or an example has no probability"
            )
        self.scores[split] = score
        for name, value in values.items():
            # All processes hold this value: their mean, which is asked for, is the value itself.
            self.log(f"{split}_{name}", value.float(), prog_bar=name == "bpc", sync_dist=True)

    def _total(self, count: Tensor) -> int:
        return int(self.trainer.strategy.reduce(count.clone(), reduce_op="sum"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a resumed run needs to repeat the uninterrupted one.

        Raises:
            NonFiniteError: If the training has diverged.
        """
        self._watch.check()
        super().on_save_checkpoint(checkpoint)
        number, before = self._before
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()["total"]
        # A batch that fails is trained on again.
        fails = batches["processed"] == number < batches["ready"]
        checkpoint["training"] = before if fails else self.training_state()

    def training_state(self) -> dict[str, Any]:
        """Returns what training has changed in the module beside its parameters and buffers."""
        return {"seed": self._seed, "train_bpc": self._smoothed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what :meth:`on_save_checkpoint` added."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("training", {})
        self._seed = state.get("seed", self._seed)
        self._smoothed = state.get("train_bpc")


def compute(metric: Metric) -> Tensor:
    """Computes a metric on all processes, also where this one had no batch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        value: Tensor = metric.compute()
    return value
