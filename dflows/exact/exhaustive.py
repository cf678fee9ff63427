"""The best flow of a distribution of few states, by trying every one."""

from collections.abc import Sequence
from itertools import permutations, product

import torch
from torch import Tensor

from dflows.bijections import Bijection
from dflows.errors import UserError
from dflows.exact.ascent import Layer
from dflows.exact.maps import Maps, maps_of
from dflows.exact.measures import check_probabilities
from dflows.exact.tabular import checked_table
from dflows.orderings import Ordering

__all__ = ["exhaustive_optimum"]

MOST_PERMUTED = 9
"""States whose bijections are all gone through."""

MOST_REACHED = 1_000_000
"""Flows of a stack that are all gone through."""


def exhaustive_optimum(
    probabilities: Tensor,
    orderings: Sequence[Ordering] | None = None,
    bijection: Bijection | None = None,
) -> float:
    """Finds the best bijection of all states with a factorized base, by trying every one.

    Args:
        probabilities: The probability of every state, (K,) * D, at most nine.
        orderings: The ordering of each transform, base → data, of the flows to be considered; every
            bijection of the states without them.
        bijection: What these flows do to one variable.

    Returns:
        The smallest cross-entropy in nats that there is.

    Raises:
        UserError: If `probabilities` is no table of probabilities, or there are too many flows.

    Example:
        >>> probabilities = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
        >>> round(exhaustive_optimum(probabilities), 4)
        1.2839
    """
    table = check_probabilities(probabilities).cpu()
    count = table.numel()
    if count > MOST_PERMUTED:
        raise UserError(
            f"the table has {count:,} probabilities, and not all bijections of more than "
            f"{MOST_PERMUTED} states can be tried: use tabular_flow"
        )
    if (orderings is None) != (bijection is None):
        raise UserError("orderings or a bijection was given alone: give both, or none of them")
    if orderings is None or bijection is None:
        targets = torch.tensor(list(permutations(range(count))))
    else:
        targets = _reached(checked_table(table, bijection), orderings, maps_of(bijection))
    pushed = torch.empty(targets.shape, dtype=table.dtype)
    pushed = pushed.scatter_(1, targets, table.flatten().expand_as(pushed))
    num_classes, total = table.shape[0], torch.zeros(len(targets), dtype=table.dtype)
    for dimension in range(table.ndim):
        parts = pushed.reshape(len(targets), num_classes**dimension, num_classes, -1)
        total += torch.special.entr(parts.sum(dim=(1, 3))).sum(dim=-1)
    return float(total.min())


def _reached(table: Tensor, orderings: Sequence[Ordering], maps: Maps) -> Tensor:
    """Returns the different bijections (n, K^D) that some flow of a stack is, data → base."""
    num_classes, length = table.shape[0], table.ndim
    # Of a single dimension, which no transform changes, there may be too many to be listed.
    listed = torch.empty(0) if maps.listed is None else maps.listed
    reached = torch.arange(table.numel()).unsqueeze(0)
    for ordering in reversed(orderings):
        layer = Layer(ordering, length, maps, num_classes)
        targets = layer.target.flatten().unsqueeze(0)
        for site in layer.sites:
            each = list(product(range(len(listed)), repeat=site.contexts))
            alone = torch.zeros(len(each), *table.shape, dtype=torch.long)
            for part, choice in zip(alone, each, strict=True):
                site.add(part, site.stride * listed[list(choice)])
            targets = (targets.unsqueeze(1) + alone.flatten(1)).flatten(0, 1)
        if len(targets) * len(reached) > MOST_REACHED:
            raise UserError(
                f"{len(orderings)} transforms of {table.numel()} states make too many flows to try "
                "them all: give fewer orderings, or none for all bijections"
            )
        reached = targets[:, reached].flatten(0, 1).unique(dim=0)
    return reached
