"""Progress: a bar on a terminal, and a line from time to time where there is none."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, RichProgressBar, Timer

from dflows.cli.logs import LOG, in_words
from dflows.errors import UserError
from lightning_modules import BaseModule

__all__ = ["ProgressBar", "ProgressLines"]


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


class ProgressLines(Callback):
    """Creates a line of progress from time to time, where the output is no terminal.

    A line has the step, bits per character, characters a second, the time left and the learning
    rate, and no control characters; every validation and test has a line when it is done. Lines go
    to the standard error, and come of the first process alone.

    Args:
        every_seconds: Seconds from one line to the next, at least; 0 writes none. Lines come after
            batches; where one takes long, a command tells once a minute that it still runs.

    Raises:
        UserError: If `every_seconds` is below 0.
    """

    def __init__(self, every_seconds: float = 30.0) -> None:
        if not every_seconds >= 0:
            raise UserError(f"progress_lines.every_seconds is {every_seconds}: give at least 0")
        self.every_seconds = every_seconds
        self.clock: Callable[[], float] = time.monotonic
        self._on = False
        self._begin = self._last = self._begin_evaluation = 0.0
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

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to count the seconds of a validation."""
        self._begin_evaluation = self.clock()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to count the seconds of a test."""
        self._begin_evaluation = self.clock()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any
    ) -> None:
        """Writes a line if it is time."""
        if self._due() and not trainer.sanity_checking:
            self._write(trainer, f"{_validation(trainer)}, batch {arguments[2] + 1:,}")

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any
    ) -> None:
        """Writes a line if it is time."""
        if self._due():
            self._write(trainer, f"test, batch {arguments[2] + 1:,}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes what came of a validation."""
        if not trainer.sanity_checking:
            self._write_scores(trainer, "valid", _validation(trainer))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes what came of a test."""
        self._write_scores(trainer, "test", "test")

    def _due(self) -> bool:
        return self._on and self.clock() - self._last >= self.every_seconds

    def _write_scores(self, trainer: pl.Trainer, split: str, what: str) -> None:
        if self._on:
            took = f"in {in_words(self.clock() - self._begin_evaluation)}"
            LOG.info(", ".join([what, *_metrics(trainer, f"{split}_bpc"), took]))

    def _write(self, trainer: pl.Trainer, where: str) -> None:
        self._last = self.clock()
        parts = [where, *_metrics(trainer, "train_bpc", "valid_bpc")]
        passed = self._last - self._begin
        if self._characters and passed > 0:
            parts.append(f"{self._characters / passed:,.0f} characters a second")
        if trainer.training or trainer.state.fn == "fit":
            left = self._left(trainer, passed)
            parts.append("end unknown" if left is None else f"{in_words(left)} left")
            rates = [
                f"{group['lr']:.3g}" for one in trainer.optimizers for group in one.param_groups
            ]
            parts += [f"learning rate {' and '.join(dict.fromkeys(rates))}"] if rates else []
        LOG.info(", ".join(parts))

    def _left(self, trainer: pl.Trainer, passed: float) -> float | None:
        """Returns the seconds until training ends by steps or by time, where that is known."""
        ends: list[float] = []
        steps, done = trainer.estimated_stepping_batches, trainer.global_step - self._first_step
        if 0 < steps < math.inf and done:
            ends.append((steps - trainer.global_step) * passed / done)
        timers = [entry for entry in trainer.callbacks if isinstance(entry, Timer)]  # type: ignore[attr-defined]
        ends += [left for timer in timers if (left := timer.time_remaining()) is not None]
        return min(ends, default=None)


def _validation(trainer: pl.Trainer) -> str:
    """Says which validation there is, one of a fit or another."""
    during = f" after step {trainer.global_step:,}" if trainer.state.fn == "fit" else ""
    return f"validation{during}"


def _metrics(trainer: pl.Trainer, *names: str) -> list[str]:
    """Returns the metrics of these names, as far as there are any."""
    found = trainer.callback_metrics
    return [f"{name} {float(found[name]):.4f}" for name in names if name in found]
