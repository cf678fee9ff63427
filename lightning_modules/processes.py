"""What several processes must do at the same time."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from lightning_modules.sharding import FullySharded

__all__ = ["SharedBuffers", "mean_of_processes", "share_of_process"]


def mean_of_processes(value: Tensor) -> Tensor:
    """Returns the mean of what all processes have, which must come by here together."""
    if not distributed.is_initialized():
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def share_of_process(parts: Tensor, dim: int, processes: int) -> Tensor:
    """Shares out among processes what as many others, or fewer, or more had of a batch.

    Args:
        parts: What each of them had (R, …).
        dim: Where in a part the examples of the batch are.
        processes: The number of those that share it.

    Returns:
        What each is to have, in the order of the examples.

    Example:
        >>> share_of_process(torch.tensor([[1, 2], [3, 4]]), dim=-1, processes=1)
        tensor([[1, 2, 3, 4]])
    """
    whole = torch.cat(parts.unbind(), dim=dim)
    return torch.stack(whole.tensor_split(processes, dim=dim))


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
        if isinstance(trainer.strategy, FullySharded):
            trainer.strategy.evaluates()
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel) and model.will_sync_module_buffers():
            model._sync_buffers()  # it has no public name
            model.require_forward_param_sync = False
