"""Signals that end a run do so between two steps, so that it is resumed exactly."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.callbacks import Callback
from torch import distributed

from dflows.cli.slurm import RequeueRequest
from dflows.cli.together import SignalConnector

__all__ = ["StopBetweenSteps"]


class StopBetweenSteps(Callback):
    """Creates what ends a run when a signal asks for it: while it trains, after the step.

    SIGINT, which Ctrl-C sends, interrupts it; a second one does so at once. SIGUSR1, which SLURM
    sends before a job's time is up, has it requeued. What several processes do, they agree on:
    :mod:`dflows.cli.together`.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._asked = 0
        self._training = self._ending = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens to the signals while the context lasts."""
        signals = [signal.SIGINT]
        if SLURMEnvironment.detect():
            signals.append(signal.SIGUSR1)
        # Only the main thread can listen, and what a shell ignores in the background stays so.
        known = {number: signal.getsignal(number) for number in signals}
        heard = {
            number: handler
            for number, handler in known.items()
            if handler is not signal.SIG_IGN
            and threading.current_thread() is threading.main_thread()
        }
        for number in heard:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in heard.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._ending:
            return
        trainer = self._trainer
        several = distributed.is_initialized() and number == signal.SIGUSR1
        if several and trainer is not None:
            cast("SignalConnector", trainer._signal_connector).note(number)
        elif self._training and not self._asked:
            self._asked = number
        elif number == signal.SIGINT or not self._training:
            self._end(number)

    def _end(self, number: int) -> None:
        self._ending = True
        raise KeyboardInterrupt if number == signal.SIGINT else RequeueRequest

    def _end_if_asked(self) -> None:
        if self._training and self._asked:
            self._end(self._asked)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Sees whether there are other processes, which must end at the same step."""
        self._trainer = trainer

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sees that there is something to lose."""
        self._training = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends, if it was asked for."""
        self._end_if_asked()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends, if it was asked for: the validation is then made up for."""
        self._end_if_asked()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any
    ) -> None:
        """Ends, if it was asked for."""
        self._end_if_asked()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends, if it was asked for."""
        self._end_if_asked()
        self._training = False

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Lets what is saved be saved."""
        self._ending = True
