"""What a training batch takes at least, by what two of its examples take."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from dflows.errors import UserError
from dflows.memory import check_memory, total_memory
from lightning_modules.data import DataFacts

__all__ = ["check_batch", "saved_bytes"]

BYTES = 8192
"""What a dimension of an example hardly takes: batches of fewer in all are not looked at."""


def check_batch(module: pl.LightningModule, data: DataFacts) -> None:
    """Refuses training batches that cannot fit, before one is read.

    What the backward pass needs of each example is there at the end of the forward pass. It is
    measured where the batch is so large that it might not fit.

    Args:
        module: The module, whose `evaluate_objective` is measured.
        data: The training data.

    Raises:
        UserError: If a batch takes more than the memory of the device.
    """
    size, length = data.batch_size, data.length
    device = module.trainer.strategy.root_device
    if size is None or length is None or size * length * BYTES < total_memory(device):
        return
    try:
        y, context = next(data.training_batches(2))
        rows = y[:1] if context is None else (y[:1], context[:1])
        both = y if context is None else (y, context)
        needed = size * (saved_bytes(module, both) - saved_bytes(module, rows))
    except UserError:
        raise
    except Exception:  # noqa: BLE001 - what the objective cannot do with two examples, it need not
        return
    what = f"a training batch of {size:,} examples of {length:,} dimensions"
    check_memory(needed, what, "give a smaller data.batch_size", device)


def saved_bytes(module: Any, batch: Any) -> int:
    """Returns the bytes that the backward pass of a batch needs, what all share included."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    context = module.trainer.precision_plugin.train_step_context()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.random.fork_rng(devices=[]), context, hooks, torch.enable_grad():
        torch.manual_seed(0)
        module.evaluate_objective(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())
