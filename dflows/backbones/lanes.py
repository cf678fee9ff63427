"""Lanes: runs of neighbouring dimensions that are read one after the other, side by side."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.errors import UserError
from dflows.remembered import Remembered

__all__ = [
    "LaneDistances",
    "Lanes",
    "known_ahead",
    "lane_distances",
    "lanes_behind_context",
    "lanes_of",
    "steps_ahead",
]

TOLD_APART = 32
"""Distances along a lane beyond which all are alike."""


class Lanes(NamedTuple):
    """The lanes of an event: L runs of up to C dimensions, each read from its head.

    A head is a dimension of level 0; the levels rise by one along the lane, from left to right or
    from right to left. All lanes are read at once, one dimension of each a level.

    Attributes:
        dimensions: The dimension (L, C) of every lane and level; D where the lane has ended.
        directions: 1 or -1 for every dimension (D,): whether its lane runs to the right.
        members: The lanes (m,) that have a dimension at each level, or None where all have one.
    """

    dimensions: Tensor
    directions: Tensor
    members: list[Tensor | None]


def lanes_of(levels: Tensor) -> Lanes | None:
    """Finds the lanes of levels (D,), 0, 1, 2, …; None where they do not run in lanes.

    Example:
        >>> lanes_of(torch.tensor([0, 1, 2, 0, 1])).dimensions
        tensor([[0, 1, 2],
                [3, 4, 5]])
        >>> lanes_of(torch.tensor([0, 2, 1, 2, 0])) is None
        True
    """
    length, device = len(levels), levels.device
    levels = levels.cpu()
    dimensions = torch.arange(length)
    outside = levels.new_full((1,), -2)
    after_left = torch.cat([outside, levels[:-1]]) == levels - 1
    after_right = torch.cat([levels[1:], outside]) == levels - 1
    heads = levels == 0
    rightward = after_left & ~heads
    leftward = after_right & ~heads & ~rightward
    parents = dimensions - rightward.long() + leftward.long()
    followed = parents[~heads].bincount(minlength=length)
    if not bool((heads | rightward | leftward).all()) or bool((followed > 1).any()):
        return None
    directions = torch.where(leftward, -1, 1)
    directions[parents[leftward]] = -1
    roots = dimensions - directions * levels
    lanes = roots.unique(return_inverse=True)[1]
    table = torch.full((int(lanes.max()) + 1, int(levels.max()) + 1), length)
    table[lanes, levels] = dimensions
    members = [(column < length).nonzero().squeeze(-1) for column in table.T]
    return Lanes(
        table.to(device),
        directions.to(device),
        [None if len(found) == len(table) else found.to(device) for found in members],
    )


def lanes_behind_context(levels: Tensor, reader: str, remedy: str) -> tuple[int, Lanes]:
    """Finds the lanes of levels (D,) behind entries of -1, the context.

    Args:
        levels: The levels.
        reader: What needs lanes, and why.
        remedy: What else can be done than to choose another ordering.

    Returns:
        The number of context tokens, and the lanes of the dimensions behind them.

    Raises:
        UserError: If the levels do not run in lanes.
    """
    context = int((levels < 0).sum())
    inner = levels[context:]
    lanes = lanes_of(inner) if len(inner) and bool((levels[:context] == -1).all()) else None
    if lanes is None:
        given = f"{levels.tolist()[:16]}{' …' if len(levels) > 16 else ''}"
        raise UserError(
            f"{reader} and serves the orderings Natural, Reversed and Strided, not the levels "
            f"{given}: choose one of these orderings, {remedy}"
        )
    return context, lanes


def known_ahead(levels: Tensor, directions: Tensor, reach: int) -> Tensor:
    """Tabulates which dimensions ahead, in the direction of the lane, are known before a dimension.

    Args:
        levels: Levels (D,).
        directions: 1 or -1 for every dimension (D,).
        reach: The largest distance, n.

    Returns:
        The dimensions (D, n) at distances 1 to n; D where one is of no lower level, or beyond the
        ends.

    Example:
        >>> known_ahead(torch.tensor([0, 1, 2, 0, 1, 2]), torch.ones(6, dtype=torch.long), 2)
        tensor([[6, 6],
                [6, 3],
                [3, 4],
                [6, 6],
                [6, 6],
                [6, 6]])
    """
    length = len(levels)
    dimensions = torch.arange(length, device=levels.device).unsqueeze(-1)
    distances = torch.arange(1, reach + 1, device=levels.device)
    ahead = dimensions + directions.unsqueeze(-1) * distances
    inside = (ahead >= 0) & (ahead < length)
    known = inside & (levels[ahead.clamp(0, length - 1)] < levels.unsqueeze(-1))
    return torch.where(known, ahead, length)


def steps_ahead(known: Tensor) -> Tensor:
    """Counts the steps from a dimension to the first known one ahead.

    Args:
        known: Whether the dimension at each of n distances, 1 to n, is known (D, n).

    Returns:
        Distances (D,), 1..n; 0 where none is known.

    Example:
        >>> steps_ahead(torch.tensor([[False, False], [False, True], [True, True]]))
        tensor([0, 2, 1])
    """
    first = F.pad(known, (0, 1)).long().argmax(dim=-1) + 1
    return torch.where(known.any(dim=-1), first, 0)


def lane_distances(levels: Tensor, reader: str, remedy: str) -> Tensor:
    """Tabulates how far dimensions are from the head of their lane, and from what is known ahead.

    Args:
        levels: Levels (D,); entries of -1 in front are context.
        reader: As in :func:`lanes_behind_context`.
        remedy: Likewise.

    Returns:
        Both distances (2, D), cut off at 32; the second is 0 where nothing so near is known. Those
        of context are -1.

    Example:
        >>> lane_distances(torch.tensor([-1, 0, 1, 2, 0, 1]), "a network", "or none")
        tensor([[-1,  0,  1,  2,  0,  1],
                [-1,  0,  2,  1,  0,  0]])
    """
    context, lanes = lanes_behind_context(levels, reader, remedy)
    inner = levels[context:]
    ahead = steps_ahead(known_ahead(inner, lanes.directions, TOLD_APART) < len(inner))
    return F.pad(torch.stack([inner.clamp(max=TOLD_APART), ahead]), (context, 0), value=-1)


class LaneDistances(nn.Module):
    """Creates embeddings of the distances along a lane, which serve any number of levels.

    Args:
        width: Features of one dimension.
        reader: What needs lanes, and why, for messages.
        remedy: What else can be done than to choose another ordering.
    """

    def __init__(self, width: int, reader: str, remedy: str) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(2, TOLD_APART + 1, width) * 0.1)
        self._distances = Remembered(partial(lane_distances, reader=reader, remedy=remedy))

    def forward(self, levels: Tensor) -> Tensor:
        """Embeds the dimensions of levels (D,) to (D, width); context to zeros.

        Raises:
            UserError: If the levels do not run in lanes.
        """
        tables = F.pad(self.embedding, (0, 0, 1, 0))
        from_head, ahead = self._distances(levels) + 1
        return F.embedding(from_head, tables[0]) + F.embedding(ahead, tables[1])
