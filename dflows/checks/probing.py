"""Copies of what is certified, and the values that they are probed with."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from dflows.classes import Classes
from dflows.conditioner import Conditioner
from dflows.errors import UserError
from dflows.modules import device_of

__all__ = [
    "CertificateError",
    "context_rows",
    "probed",
    "shake",
    "stir",
    "values_of",
    "variants",
]

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)

SHAKE = 0.05


class CertificateError(UserError):
    """A flow that is not what its likelihood presumes, with where it shows."""


@contextmanager
def probed(module: _ModuleT) -> Iterator[_ModuleT]:
    """Yields a copy in evaluation mode, for a context without gradients.

    The module itself is not touched, nor is what it remembers, nor the random state.
    """
    device = device_of(module)
    devices = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield copy.deepcopy(module).eval()


def variants(module: _ModuleT, trained: bool) -> Iterator[tuple[_ModuleT, bool]]:
    """Yields a copy to probe, and whether it was shaken: the weights as they are, and then shaken.

    Args:
        module: A copy, which is changed in place.
        trained: Whether to yield the weights as they are; untrained ones hide what a network does.
    """
    if trained:
        yield module, False
    yield shake(module), True


def shake(module: _ModuleT) -> _ModuleT:
    """Changes all parameters a little, in place."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter), alpha=SHAKE)
    return stir(module)


def stir(module: _ModuleT) -> _ModuleT:
    """Changes features and logits, in place, so that other maps are chosen."""
    for part in module.modules():
        if isinstance(part, Conditioner):
            part.head.weight.add_(torch.randn_like(part.head.weight), alpha=part.width**-0.5)
            if part.embedding.query is not None:
                part.embedding.query.add_(torch.randn_like(part.embedding.query))
    return module


def context_rows(context: Tensor | None, rows: int) -> Tensor | None:
    """Returns a context for so many rows, those that there are in turn."""
    if context is None:
        return None
    return context[torch.arange(rows, device=context.device) % len(context)]


def values_of(batch: Tensor | None, classes: Classes, shape: tuple[int, int]) -> Tensor:
    """Returns values (rows, d): the data's rows in turn, or random ones where there are none."""
    rows, length = shape
    if batch is None or batch.shape[1] < length:
        device = None if batch is None else batch.device
        return classes.draw(shape, device)
    return batch[torch.arange(rows, device=batch.device) % len(batch), :length].long()
