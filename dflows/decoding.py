"""Values decided level by level, or all at once until nothing changes."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from dflows.conditioner import Conditioner

__all__ = ["Decide", "decide_levels", "solve_fixed_point"]

Decide: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Decides the values of some dimensions: from their numbers (n,) and logits (N, n, num_logits)
to indices (N, n) or one-hot vectors (N, n, K)."""


def decide_levels(
    conditioner: Conditioner,
    y: Tensor,
    decide: Decide,
    context: Tensor | None = None,
    *,
    prefix_length: int = 0,
    first_level: int = 0,
) -> Tensor:
    """Decides the values level by level, in one evaluation each.

    Args:
        conditioner: The network and its ordering.
        y: Indices (N, d) or one-hot vectors (N, d, K), right below the first level.
        decide: What the values of a level are, given its dimensions and logits.
        context: Vectors (N, C) or sequences (N, S, C).
        prefix_length: The first so many dimensions are right, too, and are not decided; they must
            depend on none behind them (:meth:`~dflows.conditioner.Conditioner.supports_prefix`).
        first_level: The lowest level that is decided.

    Returns:
        The values, in the representation of `y`.
    """
    evaluate = conditioner.level_by_level(y, context)
    num_levels = len(conditioner.layout(y.shape[1], y.device).members)
    for level in range(first_level, num_levels):
        unknown, logits = evaluate(y, level, prefix_length)
        if len(unknown):
            y = y.index_copy(1, unknown, decide(unknown, logits))
    return y


def solve_fixed_point(
    conditioner: Conditioner,
    y: Tensor,
    decide: Decide,
    context: Tensor | None = None,
    *,
    prefix_length: int = 0,
    first_level: int = 0,
) -> tuple[Tensor, int]:
    """Decides the values of all dimensions at once, again and again until nothing changes.

    An iteration settles at least one more level, so that the values are those of
    :func:`decide_levels` after as many iterations as levels at most, and one to see it.

    Args:
        conditioner: As in :func:`decide_levels`, as are the rest.
        y: Indices (N, d), right below the first level, anything elsewhere.
        decide: What the values are.
        context: Vectors (N, C) or sequences (N, S, C).
        prefix_length: Dimensions that are known.
        first_level: The lowest level that is decided.

    Returns:
        The values (N, d) and the number of iterations.
    """
    members = conditioner.layout(y.shape[1], y.device).members
    if len(members) <= first_level:
        return y, 0
    dimensions = torch.cat(members[first_level:]).sort().values
    dimensions = dimensions[dimensions >= prefix_length]
    if not len(dimensions):
        return y, 0
    iterations = 0
    for _ in range(len(members) + 1):
        iterations += 1
        logits = conditioner(y, context, first_level=first_level)[:, dimensions]
        values = decide(dimensions, logits)
        settled = torch.equal(values, y[:, dimensions])
        y = y.index_copy(1, dimensions, values)
        if settled:
            break
    return y, iterations
