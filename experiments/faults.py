"""What goes wrong in one process of several, at a place of choice."""

import os
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

__all__ = ["MOMENT", "SIGNALS", "Fault"]

SIGNALS = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}

MOMENT = "moment"
"""The file in the working folder that is written when it happens."""


class Fault(Callback):
    """Creates a fault.

    Args:
        what: `raised`, or what a signal does.
        rank: The process; -1 for all.
        place: `setup`, `train` or `valid`.
        number: The step of training, or the batch of all validations.
    """

    def __init__(self, what: str, rank: int, place: str, number: int = 0) -> None:
        self.what, self.rank, self.place, self.number = what, rank, place, number
        self.batches = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fails, if it is to do so here."""
        self._happen(trainer, "setup", 0)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Fails after a step of training."""
        self._happen(trainer, "train", trainer.global_step)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Fails after a batch of a validation."""
        self.batches += not trainer.sanity_checking
        self._happen(trainer, "valid", self.batches)

    def _happen(self, trainer: pl.Trainer, place: str, number: int) -> None:
        if (place, number) != (self.place, self.number):
            return
        if self.rank not in (-1, trainer.global_rank):
            return
        Path(MOMENT).touch()
        if self.what == "raised":
            raise RuntimeError("the loader broke")
        os.kill(os.getpid(), SIGNALS[self.what])
