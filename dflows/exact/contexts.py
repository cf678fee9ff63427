"""One evaluation of a network for every context, where many states share one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from dflows.conditioner import Conditioner

__all__ = ["each_context_once"]

MOST_CONTEXTS = 2**62


class _Once:
    """Creates what stands in for a conditioner's evaluation, and gives the same logits.

    The logits of a dimension depend on those of lower levels alone, and among all states few values
    of these are different: half of the dimensions have the square root of the states.
    """

    def __init__(self, conditioner: Conditioner) -> None:
        self._conditioner = conditioner

    def __call__(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        conditioner = self._conditioner
        whole = partial(type(conditioner).forward, conditioner, y, context)
        # Values with a gradient, and contexts, differ from row to row.
        if y.ndim != 2 or y.is_floating_point() or context is not None:
            return whole()
        levels, members = conditioner.levels(y.shape[1], y.device)
        rows = torch.arange(len(y), device=y.device)
        found, count = [], 0
        for level in range(conditioner.first_level, len(members)):
            lower = y[:, levels < level]
            if conditioner.num_classes ** lower.shape[1] > MOST_CONTEXTS:
                return whole()
            powers = conditioner.num_classes ** torch.arange(lower.shape[1], device=y.device)
            number, where = (lower * powers).sum(dim=-1).unique(return_inverse=True)
            some = rows.new_empty(len(number)).scatter_(0, where, rows)
            found.append((level, members[level], some, where))
            count += len(some)
        if count >= len(y):
            return whole()
        logits = conditioner.head.weight.new_zeros(*y.shape, conditioner.num_outputs)
        for level, dimensions, some, where in found:
            logits.index_copy_(1, dimensions, conditioner.level_logits(y[some], level)[where])
        return logits


@contextmanager
def each_context_once(module: nn.Module) -> Iterator[None]:
    """Makes the networks of a flow evaluate every context once, without gradients.

    Args:
        module: The flow.
    """
    conditioners = [part for part in module.modules() if isinstance(part, Conditioner)]
    for conditioner in conditioners:
        conditioner.forward = _Once(conditioner)  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            yield
    finally:
        for conditioner in conditioners:
            del conditioner.forward
