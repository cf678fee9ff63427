"""What all modules share: steps, likelihood metrics, optimizer and schedule, exact resume."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from dflows.errors import UserError
from dflows.metrics import BitsPerCharacter, NatsPerExample

__all__ = ["DEFAULT_OPTIMIZATION", "BaseModule", "Batch", "Optimization"]

Batch: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Indices (B, d), or indices and what they are conditioned on (B, …)."""

SMOOTHING = 0.98


@dataclass(frozen=True)
class Optimization:
    """Creates the settings of AdamW and of its learning rate's course.

    Arguments:
        learning_rate: Learning rate after the warm-up.
        base_learning_rate: That of the base distribution under flows; the same where it is not
            given.
        weight_decay: Decoupled weight decay of matrices; biases, norms, embeddings and the logits
            of a factorized base have none.
        betas: Decay of Adam's running means.
        warmup_steps: Optimizer steps over which the learning rate rises from 0.
        schedule: What it does then: ``constant``, or a fall to 0 along a ``cosine`` or a ``linear``
            line. It reaches 0 with `trainer.max_steps`, or with `trainer.max_time` if that comes
            first; by time, a resumed run goes on where it was but does not repeat the
            uninterrupted one bit by bit.
        cycles: Equal parts of the training; in each the learning rate takes its whole course,
            warm-up included, as flows that are trained in turn need it
            (:class:`dflows.estimators.LocalInTurn`).
        hold_base_steps: First steps in which the base under flows is left as it is, and is not
            refitted either.

    Raises:
        UserError: If a number is out of range.
    """

    learning_rate: float = 1e-3
    base_learning_rate: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    cycles: int = 1
    hold_base_steps: int = 0

    def __post_init__(self) -> None:
        for name, value in (
            ("learning_rate", self.learning_rate),
            ("base_learning_rate", self.base_learning_rate),
        ):
            if value is not None and not value > 0:
                raise UserError(f"optimization.{name} is {value}: give a positive number")
        for name, value in (
            ("weight_decay", self.weight_decay),
            ("warmup_steps", self.warmup_steps),
            ("hold_base_steps", self.hold_base_steps),
        ):
            if value < 0:
                raise UserError(f"optimization.{name} is {value}: give at least 0")
        if self.cycles < 1:
            raise UserError(f"optimization.cycles is {self.cycles}: give at least 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimization.betas is {self.betas}: give numbers from 0 to below 1")
        if self.schedule not in ("constant", "cosine", "linear"):
            raise UserError(
                f"optimization.schedule is {self.schedule!r}: give constant, cosine or linear"
            )
        if self.cycles > 1 and self.schedule == "constant" and not self.warmup_steps:
            raise UserError(
                f"optimization.cycles is {self.cycles}, and a constant learning rate has no course "
                "to repeat: give schedule cosine or linear, or warmup_steps"
            )

    def factor(self, step: int, progress: float) -> float:
        """Returns what the learning rates are multiplied by.

        Args:
            step: Optimizer steps done.
            progress: The part of the training that is done, 0 to 1.

        Example:
            >>> Optimization(warmup_steps=10, schedule="linear").factor(4, progress=0.2)
            0.4
            >>> Optimization(schedule="linear", cycles=2).factor(75, progress=0.75)
            0.5
        """
        if self.cycles > 1 and 0 < progress < 1:
            part = progress * self.cycles % 1
            step = round(step * part / (progress * self.cycles))
            progress = part
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        match self.schedule:
            case "cosine":
                return warm * 0.5 * (1 + math.cos(math.pi * progress))
            case "linear":
                return warm * (1 - progress)
            case _:
                return warm


DEFAULT_OPTIMIZATION = Optimization()


class BaseModule(pl.LightningModule, ABC):
    """Creates a module that is trained on an objective and judged by likelihoods.

    A subclass says what the objective, the likelihood and a sample are; steps, metrics, optimizer,
    schedule and resume are here. It logs `train_bpc` (smoothed), `valid_bpc`, `valid_nats`,
    `test_bpc` and `test_nats`: bits per character count all dimensions of an example as characters,
    nats are those of a whole example.

    Randomness in a training step depends on the seed, the process and the number of the batch
    alone, so that a resumed run repeats the uninterrupted one.

    Arguments:
        optimization: Settings of the optimizer.

    Attributes:
        likelihood: Whether the likelihoods are ``exact``, or a ``bound`` that they do not reach.
            Tables and records say which.
    """

    likelihood: ClassVar[Literal["exact", "bound"]] = "exact"

    def __init__(self, optimization: Optimization = DEFAULT_OPTIMIZATION) -> None:
        super().__init__()
        self.optimization = optimization
        self.metrics = nn.ModuleDict(
            {
                split: nn.ModuleDict({"bpc": BitsPerCharacter(), "nats": NatsPerExample()})
                for split in ("valid", "test")
            }
        )
        self.counted: dict[str, dict[str, int]] = {"characters": {}, "examples": {}}
        self.standard_error: dict[str, float] = {}
        self._smoothed: Tensor | None = None
        self._seed = 0

    @abstractmethod
    def objective(self, batch: Batch) -> Tensor:
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
        method: Literal["levels", "fixed_point"] = "levels",
        context: Tensor | None = None,
    ) -> Tensor:
        """Draws indices (num_samples, length), each given a context of its own or all none."""

    @property
    def passes(self) -> int | None:
        """Sequential network evaluations that drawing a batch takes, where they are known."""
        return None

    def base_parameters(self) -> Iterable[nn.Parameter]:
        """Returns the parameters that have `base_learning_rate` and are held at first."""
        return ()

    def prepare(self) -> None:
        """Starts and checks the model once the data are known, before a fit; a hook."""

    @staticmethod
    def indices_of(batch: Batch) -> Tensor:
        """Returns the indices (B, d) of a batch."""
        return batch if isinstance(batch, Tensor) else batch[0]

    @staticmethod
    def context_of(batch: Batch) -> Tensor | None:
        """Returns what the indices of a batch are conditioned on, or nothing."""
        return None if isinstance(batch, Tensor) else batch[1]

    def setup(self, stage: str) -> None:
        """Prepares a fit.

        Raises:
            UserError: If it has no steps.
        """
        if stage == "fit":
            if self.trainer.max_steps == 0:
                raise UserError("trainer.max_steps is 0: give at least 1, or -1 for no such end")
            self._seed = torch.initial_seed()
            with torch.random.fork_rng(devices=[]):
                self.prepare()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds what is drawn in this step."""
        trainer = self.trainer
        draw = trainer.fit_loop.total_batch_idx * trainer.world_size + trainer.global_rank + 1
        torch.manual_seed((self._seed + 0x9E3779B97F4A7C15 * draw) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss: nats per dimension, so that learning rates do not depend on D."""
        loss = -self.objective(batch).mean() / self.indices_of(batch).shape[-1]
        bits = loss.detach().float() / math.log(2)
        smoothed = bits if self._smoothed is None else self._smoothed.to(bits.device)
        self._smoothed = smoothed.lerp(bits, 1 - SMOOTHING)
        self.log("train_bpc", self._smoothed, prog_bar=True)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Computes gradients, where there is anything to train by them."""
        if loss.requires_grad:
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self._update("valid", batch, self.log_prob(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the test metrics."""
        self._update("test", batch, self.log_prob(batch))

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

    def _log_metrics(self, split: str) -> None:
        for name, metric in self.metrics[split].items():  # type: ignore[operator]
            value = compute(metric)
            # All processes hold this value: their mean, which is asked for, is the value itself.
            self.log(f"{split}_{name}", value.float(), prog_bar=name == "bpc", sync_dist=True)
        metrics = self.metrics[split]
        self.counted["characters"][split] = self._total(metrics["bpc"].num_characters)  # type: ignore[index]
        self.counted["examples"][split] = self._total(metrics["nats"].num_examples)  # type: ignore[index]
        self.standard_error[split] = float(metrics["nats"].standard_error())  # type: ignore[index]
        for metric in metrics.values():  # type: ignore[operator]
            metric.reset()

    def _total(self, count: Tensor) -> int:
        return int(self.trainer.strategy.reduce(count.clone(), reduce_op="sum"))

    def configure_optimizers(self) -> Any:
        """Returns AdamW with groups for matrices, for what does not decay, and for the base.

        Where there is nothing to train by gradients there is no optimizer.
        """
        settings = self.optimization
        base = {id(parameter) for parameter in self.base_parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        seen: set[int] = set()
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen or not parameter.requires_grad:
                    continue
                seen.add(id(parameter))
                decays = (
                    "weight" in name and parameter.ndim > 1 and not isinstance(module, nn.Embedding)
                )
                groups.setdefault((id(parameter) in base, decays), []).append(parameter)
        if not groups:
            return None
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": (in_base and settings.base_learning_rate) or settings.learning_rate,
                    "weight_decay": settings.weight_decay if decays else 0.0,
                }
                for (in_base, decays), parameters in groups.items()
            ],
            betas=settings.betas,
            # One kernel for all parameters; under mixed precision Lightning cannot clip for it.
            fused=not ("mixed" in self.trainer.precision and self.trainer.gradient_clip_val),
        )
        if settings.schedule != "constant" and not self.has_end:
            raise UserError(
                f"optimization.schedule is {settings.schedule} and the training has no end: "
                "set trainer.max_steps or trainer.max_time"
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: settings.factor(step, self.progress(step))
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "learning_rate"},
        }

    def _total_steps(self) -> float:
        return self.trainer.estimated_stepping_batches

    def _timer(self) -> Timer | None:
        timers = (entry for entry in self.trainer.callbacks if isinstance(entry, Timer))  # type: ignore[attr-defined]
        return next(timers, None)

    @property
    def has_end(self) -> bool:
        """Whether the training ends by steps or by time."""
        return not math.isinf(self._total_steps()) or self._timer() is not None

    def progress(self, step: int) -> float:
        """Returns the part of the training that is done after so many steps, or by time.

        All processes must ask at once.
        """
        progress = step / self._total_steps()
        timer = self._timer()
        if timer is not None and (left := timer.time_remaining()) is not None:
            elapsed = timer.time_elapsed() / (timer.time_elapsed() + max(left, 1e-9))
            if self.trainer.world_size > 1:
                # Clocks differ, and learning rates must not.
                elapsed = self.trainer.strategy.broadcast(elapsed)
            progress = max(progress, elapsed)
        return min(progress, 1.0)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Holds the base in the first steps."""
        if self.trainer.global_step < self.optimization.hold_base_steps:
            for parameter in self.base_parameters():
                parameter.grad = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a resumed run needs to repeat the uninterrupted one."""
        checkpoint["training"] = {"seed": self._seed, "train_bpc": self._smoothed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what :meth:`on_save_checkpoint` added."""
        state = checkpoint.get("training", {})
        self._seed = state.get("seed", self._seed)
        self._smoothed = state.get("train_bpc")


def compute(metric: Metric) -> Tensor:
    """Computes a metric on all processes, also where this one had no batch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        value: Tensor = metric.compute()
    return value
