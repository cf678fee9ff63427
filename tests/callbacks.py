"""Callbacks that make a run slow enough to be killed in between, or fail where it is early."""

import time

from pytorch_lightning.callbacks import Callback

from dflows.errors import UserError


class Slow(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.3)


class RefuseValidation(Callback):
    def on_validation_start(self, trainer, pl_module):
        raise UserError("no validation is wanted")
