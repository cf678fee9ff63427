"""What several processes must do at the same time."""

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch.nn.parallel import DistributedDataParallel

__all__ = ["SharedBuffers"]


class SharedBuffers(Callback):
    """Creates what lets all processes share their buffers before an evaluation.

    The wrapper around the module would do so in its first forward. A process without a batch does
    not reach that, and goes on to the metrics, where both would wait for each other for ever.
    """

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shares them."""
        self._share(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shares them."""
        self._share(trainer)

    def _share(self, trainer: pl.Trainer) -> None:
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel) and model.will_sync_module_buffers():
            model._sync_buffers()  # it has no public name
            model.require_forward_param_sync = False
