"""Stands in for the data facts until those of the data modules come."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


class TrainingData:
    """What a module asks of the data that it is trained on."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self.module: Any = trainer.datamodule  # type: ignore[attr-defined]

    @property
    def is_text(self) -> bool:
        return getattr(self.module, "is_text", False)

    @property
    def stateful(self) -> bool:
        return getattr(self.module, "stateful", getattr(self.module, "consecutive", False))

    def _loader(self) -> Any:
        if self.module is not None:
            return self.module.train_dataloader()
        return self.trainer.fit_loop._data_source.dataloader()

    def first_batch(self) -> Any:
        return next(iter(self._loader()))

    def batches(self, number: int) -> Iterator[Any]:
        return islice(iter(self._loader()), number)

    def class_counts(self, num_classes: int) -> Tensor:
        if hasattr(self.module, "class_counts"):
            return self.module.class_counts()
        batch = self.first_batch()
        y = batch if isinstance(batch, Tensor) else batch[0]
        return torch.bincount(y.flatten(), minlength=num_classes)

    def chunks(self) -> Any:
        return self.module.training_chunks() or self.batches(64)
