"""What a datamodule asks a trainer, of any number of processes."""

from types import SimpleNamespace

import pytorch_lightning as pl


class Process:
    """Stands for the trainer of one process among several."""

    def __init__(self, rank, ranks, **options):
        trainer = pl.Trainer(
            **{"max_epochs": -1, "max_steps": 1, **options},
            logger=False,
            enable_checkpointing=False,
            accelerator="cpu",
        )
        self.global_rank = rank
        self.world_size = ranks
        self.state = SimpleNamespace(fn="fit")
        self.fit_loop = trainer.fit_loop
        self.max_epochs = trainer.max_epochs
        self.max_steps = trainer.max_steps
        self.limit_train_batches = trainer.limit_train_batches
        self.val_check_interval = trainer.val_check_interval
        self.overfit_batches = trainer.overfit_batches

    def process(self, batches):
        """Counts training batches as done."""
        self.fit_loop.epoch_loop.batch_progress.increment_by(batches)
