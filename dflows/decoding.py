"""Decodes values level by level, or all at once until nothing changes."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from dflows.conditioner import Conditioner
from dflows.drafting import Drafter

__all__ = ["Decide", "decide_levels", "solve_fixed_point"]

Decide: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Decides the values of some dimensions: from their numbers (n,) and logits (N, n, num_logits)
to indices (N, n) or one-hot vectors (N, n, K)."""

AHEAD = 32
"""Levels that are drafted at once: more than are settled by one evaluation, but for few."""


def decide_levels(
    conditioner: Conditioner,
    y: Tensor,
    decide: Decide,
    context: Tensor | None = None,
    *,
    prefix_length: int = 0,
    first_level: int = 0,
) -> Tensor:
    """Decides values level by level, with one evaluation each.

    Args:
        conditioner: The network and its ordering.
        y: Indices (N, d) or one-hot vectors (N, d, K), correct below the first level.
        decide: Decides the values of a level, given its dimensions and logits.
        context: Vectors (N, C) or sequences (N, S, C).
        prefix_length: Number of first dimensions that are correct, too, and stay; they must not
            depend on later ones (:meth:`~dflows.conditioner.Conditioner.supports_prefix`).
        first_level: The lowest level to decide.

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
    drafter: Drafter | None = None,
) -> tuple[Tensor, int]:
    """Decides the values of all dimensions at once, repeatedly, until nothing changes.

    Each iteration settles at least one more level: after at most as many iterations as levels, the
    values are those of :func:`decide_levels`, and one more confirms it.

    A draft settles all levels that it guesses right before the first that it does not, and goes on
    from there: whatever it guesses, the values are the same.

    Args:
        conditioner: The network and its ordering.
        y: Indices (N, d), correct below the first level.
        decide: As in :func:`decide_levels`.
        context: Vectors (N, C) or sequences (N, S, C).
        prefix_length: As in :func:`decide_levels`.
        first_level: The lowest level to decide.
        drafter: Guesses the levels that come next, at first and after every iteration.

    Returns:
        The values (N, d) and the number of iterations.
    """
    layout = conditioner.layout(y.shape[1], y.device)
    members, levels = layout.members, layout.levels
    if len(members) <= first_level:
        return y, 0
    dimensions = torch.cat(members[first_level:]).sort().values
    dimensions = dimensions[dimensions >= prefix_length]
    if not len(dimensions):
        return y, 0
    unknown = torch.zeros_like(levels, dtype=torch.bool).index_fill(0, dimensions, True)
    lowest = levels[dimensions].min().expand(len(y), 1)
    iterations = 0
    for _ in range(len(members) + 1):
        if drafter is not None:
            y = drafter(y, unknown & (levels >= lowest) & (levels < lowest + AHEAD))
        iterations += 1
        logits = conditioner(y, context, first_level=first_level)[:, dimensions]
        values = decide(dimensions, logits)
        wrong = values != y[:, dimensions]
        y = y.index_copy(1, dimensions, values)
        if not wrong.any():
            break
        # Levels up to the lowest wrong one were decided from values that are right.
        behind = torch.where(wrong, levels[dimensions], len(members)).amin(dim=1, keepdim=True)
        lowest = behind + 1
    return y, iterations
