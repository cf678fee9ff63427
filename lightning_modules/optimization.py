"""The optimizer's settings, and a schedule that a resumed run may change."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dflows.errors import UserError

__all__ = ["DEFAULT_OPTIMIZATION", "Optimization", "Schedule", "keep_settings"]


@dataclass(frozen=True)
class Optimization:
    """Creates the settings of AdamW, of its learning-rate schedule and of how a step is computed.

    A resumed run uses these settings, not those of the checkpoint.

    Args:
        learning_rate: Learning rate after the warm-up.
        base_learning_rate: That of the base distribution under flows; the same where it is not
            given.
        weight_decay: Decoupled weight decay of matrices; biases, norms, embeddings and the logits
            of a factorized base have none.
        betas: Decay of Adam's running means.
        warmup_steps: Optimizer steps over which the learning rate rises from 0.
        schedule: What it does then: ``constant``, or a fall to 0 along a ``cosine`` or a ``linear``
            line. It reaches 0 with `trainer.max_steps`, or with `trainer.max_time` if that comes
            first; by time, a resumed run continues where it was but does not repeat the
            uninterrupted one bit by bit.
        cycles: Equal parts of the training; in each the learning rate runs through its whole
            schedule, warm-up included, as layerwise training needs it.
        hold_base_steps: First steps in which the base under flows is left as it is, and is not
            refitted either.
        compile: Whether ``torch.compile`` compiles the backbones for training, in the first step.
            What is evaluated is not compiled. It needs a C++ compiler, on a GPU Triton.
        gradient_checkpointing: Whether the layers of backbones are computed a second time for the
            gradient, in place of keeping what they computed: less memory, and more time.

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
    compile: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, value in (
            ("learning_rate", self.learning_rate),
            ("base_learning_rate", self.base_learning_rate),
        ):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"optimization.{name} is {value}: give a positive number")
        for name, value in (
            ("weight_decay", self.weight_decay),
            ("warmup_steps", self.warmup_steps),
            ("hold_base_steps", self.hold_base_steps),
        ):
            if not 0 <= value < math.inf:
                raise UserError(f"optimization.{name} is {value}: give a number of at least 0")
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
                f"optimization.cycles is {self.cycles}, and a constant learning rate has nothing "
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


class Schedule(LambdaLR):
    """Creates a schedule that a checkpoint gives its step, and this run its learning rates.

    Args:
        optimizer: The optimizer, with its learning rates before any factor.
        factor: Takes the optimizer steps done and returns what all learning rates are multiplied
            by.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self._factor = factor
        super().__init__(optimizer, factor)

    def step(self, epoch: int | None = None) -> None:
        """Goes on by a step, which counts also where an overflow in float16 let it be skipped."""
        if self._step_count > 1:
            super().step(epoch)
            return
        with warnings.catch_warnings():
            # Of the first step PyTorch takes it for a mistake.
            warnings.filterwarnings("ignore", message="Detected call of .lr_scheduler.step")
            super().step(epoch)

    def rebase(self, rates: Sequence[float]) -> None:
        """Changes the learning rates of the groups, before any factor."""
        self.base_lrs = list(rates)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate
        self.apply()

    def apply(self) -> None:
        """Sets the learning rates of the present step."""
        factor = self._factor(self.last_epoch)
        self._last_lr = [rate * factor for rate in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict()
        state.pop("_factor", None)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        self.apply()


_MEANS = {"exp_avg", "exp_avg_sq"}
"""What AdamW has of a parameter, in its shape, beside the number of steps."""


def _misfit(parameter: Tensor, state: dict[str, Any]) -> str | None:
    """Says what a checkpoint has for a parameter that an optimizer would read beyond its end."""
    if state.keys() != {"step", *_MEANS}:
        return "other means than exp_avg and exp_avg_sq"
    for name, value in state.items():
        shape = parameter.shape if name in _MEANS else ()
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return f"a {type(value).__name__} for {name}"
        if value.shape != shape or not value.is_floating_point() or value.device.type == "meta":
            return f"{name} of {value.dtype} in the shape {(*value.shape,)}"
    return None


def keep_settings(optimizer: Optimizer, settings: Callable[[], Sequence[dict[str, Any]]]) -> None:
    """Lets an optimizer take its running means from a checkpoint, and its settings from this run.

    Args:
        optimizer: The optimizer.
        settings: Returns those of each group, asked whenever a checkpoint is loaded.

    Loading raises a UserError if the checkpoint is of other parameters.
    """

    def restore(optimizer: Optimizer) -> None:
        for group, own in zip(optimizer.param_groups, settings(), strict=True):
            group.update({**optimizer.defaults, **own, "initial_lr": own["lr"]})

    def check(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        given = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != given:
            raise UserError(
                "the checkpoint and the model do not fit each other: its optimizer has "
                f"{sum(given)} parameters in {len(given)} groups, the model {sum(sizes)} in "
                f"{len(sizes)}: give it the configuration that it was trained with"
            )
        parameters = [entry for group in optimizer.param_groups for entry in group["params"]]
        names = [entry for group in state_dict["param_groups"] for entry in group["params"]]
        for parameter, name in zip(parameters, names, strict=True):
            state = state_dict["state"].get(name)
            if state is not None and (found := _misfit(parameter, state)) is not None:
                raise UserError(
                    f"the checkpoint is damaged: its optimizer has {found} for a parameter of the "
                    f"shape {(*parameter.shape,)}: give another checkpoint of the run"
                )

    optimizer.register_load_state_dict_pre_hook(check)
    optimizer.register_load_state_dict_post_hook(restore)
