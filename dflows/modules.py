"""What is asked of any module: where it is, and to be in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

__all__ = ["device_of", "evaluating"]


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of a module's first tensor; the CPU, if it has none.

    Example:
        >>> device_of(nn.Linear(2, 3, device="meta")), device_of(nn.ReLU())
        (device(type='meta'), device(type='cpu'))
    """
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Has a module in evaluation mode; after it, the parts that were training do so again.

    Example:
        >>> layers = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(layers):
        ...     [part.training for part in layers.modules()]
        [False, False, False]
        >>> [part.training for part in layers.modules()]
        [True, True, False]
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
