"""Callbacks that make a run slow enough to be killed in between, or fail where it is early."""

import os
import shutil
import signal
import time

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger

from dflows.errors import UserError


class Slow(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.3)


class Send(Callback):
    """Sends this process a signal at one of Lightning's hooks, after so many steps, once a job."""

    def __init__(self, number: int, step: int, hook: str):
        self._number, self._step = number, step
        setattr(self, hook, self._come_by)

    def _come_by(self, trainer, *arguments):
        begun = "SLURM_RESTART_COUNT" not in os.environ and not trainer.sanity_checking
        if begun and trainer.global_step == self._step:
            self._step = -1
            os.kill(os.getpid(), signal.Signals(self._number))


class RemoveFolder(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            shutil.rmtree(trainer.logger.log_dir)


class RefuseValidation(Callback):
    def on_validation_start(self, trainer, pl_module):
        raise UserError("no validation is wanted")


class Spoil(Callback):
    """Spoils the gradients of one process alone, before they are added up."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            next(pl_module.parameters()).register_hook(lambda gradient: gradient * float("nan"))


class Folderless(Logger):
    """A logger that keeps no files."""

    name = version = None

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass
