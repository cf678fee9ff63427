"""A callback that makes steps slow enough to be killed in between."""

import time

from pytorch_lightning.callbacks import Callback


class Slow(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.3)
