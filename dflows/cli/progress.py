"""Progress: a bar on a terminal, and a line from time to time where there is none."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, RichProgressBar, Timer

from dflows.errors import UserError
from lightning_modules import BaseModule

__all__ = ["ProgressBar", "ProgressLines", "in_words"]


class ProgressBar(RichProgressBar):
    """Creates a bar over all steps, with the bits per character.

    Where the entropy of the data is known, it shows nats per example, and the entropy as the floor.

    Args:
        refresh_rate: Batches from one update to the next; 0 shows no bar.
        leave: Whether finished bars stay.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    @property
    def total_train_batches(self) -> int | float:
        """The batches of the whole run, where the run is as long as its steps say."""
        steps = self.trainer.max_steps
        if steps > 0 and self.trainer.max_epochs == -1:
            return steps * self.trainer.accumulate_grad_batches
        return super().total_train_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """Returns the metrics without the version of the run."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        data = trainer.datamodule  # type: ignore[attr-defined]
        entropy = getattr(data, "entropy", None)
        if entropy is not None:
            nats = {
                name.replace("bpc", "nats"): value * math.log(2) * data.length
                for name, value in metrics.items()
                if name in ("train_bpc", "valid_bpc") and isinstance(value, float)
            }
            metrics = {**nats, "floor": entropy}
        return metrics


def in_words(seconds: float) -> str:
    """Returns a duration as people say it, in two units at the most.

    Args:
        seconds: Its seconds.

    Example:
        >>> in_words(42), in_words(3 * 60 + 5), in_words(26 * 3600 + 60)
        ('42 s', '3 min 5 s', '26 h 1 min')
    """
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class ProgressLines(Callback):
    """Creates a line of progress from time to time, where the output is no terminal.

    A line has the step, bits per character, characters a second and the time left, and no control
    characters; it goes to the standard error.

    Args:
        every_seconds: Seconds from one line to the next, at least; 0 writes none. Lines come after
            batches, so that one that takes longer is waited for.

    Raises:
        UserError: If `every_seconds` is below 0.
    """

    def __init__(self, every_seconds: float = 30.0) -> None:
        if not every_seconds >= 0:
            raise UserError(f"progress_lines.every_seconds is {every_seconds}: give at least 0")
        self.every_seconds = every_seconds
        self.clock: Callable[[], float] = time.monotonic
        self.output: TextIO | None = None
        self._on = False
        self._begin = self._last = 0.0
        self._first_step = self._characters = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Sees whether the output is a terminal."""
        self._on = trainer.is_global_zero and self.every_seconds > 0 and not sys.stdout.isatty()
        self._begin = self._last = self.clock()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to count."""
        self._begin = self._last = self.clock()
        self._first_step, self._characters = trainer.global_step, 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts, and writes a line if it is time."""
        self._characters += BaseModule.indices_of(batch).numel() * trainer.world_size
        if self._due():
            steps = trainer.estimated_stepping_batches
            of = f" of {steps:,}" if 0 < steps < math.inf else ""
            self._write(trainer, f"step {trainer.global_step:,}{of}")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any
    ) -> None:
        """Writes a line if it is time."""
        if self._due():
            done = f"validation after step {trainer.global_step:,}, batch {arguments[2] + 1:,}"
            self._write(trainer, done)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any
    ) -> None:
        """Writes a line if it is time."""
        if self._due():
            self._write(trainer, f"test, batch {arguments[2] + 1:,}")

    def _due(self) -> bool:
        return self._on and self.clock() - self._last >= self.every_seconds

    def _write(self, trainer: pl.Trainer, where: str) -> None:
        self._last = self.clock()
        parts = [where]
        for name in ("train_bpc", "valid_bpc"):
            value = trainer.callback_metrics.get(name)
            if value is not None:
                parts.append(f"{name} {float(value):.4f}")
        passed = self._last - self._begin
        if self._characters and passed > 0:
            parts.append(f"{self._characters / passed:,.0f} characters a second")
        if trainer.training or trainer.state.fn == "fit":
            left = self._left(trainer, passed)
            parts.append("end unknown" if left is None else f"{in_words(left)} left")
        print(", ".join(parts), file=self.output or sys.stderr, flush=True)

    def _left(self, trainer: pl.Trainer, passed: float) -> float | None:
        """Returns the seconds until training ends by steps or by time, where that is known."""
        ends: list[float] = []
        steps, done = trainer.estimated_stepping_batches, trainer.global_step - self._first_step
        if 0 < steps < math.inf and done:
            ends.append((steps - trainer.global_step) * passed / done)
        timers = [entry for entry in trainer.callbacks if isinstance(entry, Timer)]  # type: ignore[attr-defined]
        ends += [left for timer in timers if (left := timer.time_remaining()) is not None]
        return min(ends, default=None)
