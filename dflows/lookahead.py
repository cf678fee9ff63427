"""What stands ahead of a dimension, as trigrams see it: a table of log-likelihoods."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["MOST_CLASSES", "MOST_GAP", "Ahead", "lookahead"]

MOST_CLASSES = 64
"""Most classes of a table, whose size is their fourth power."""

MOST_GAP = 5
"""Most unknown dimensions between one and what stands ahead of it."""


class Ahead(NamedTuple):
    """What is known ahead of dimensions (d,), under an ordering.

    `gap` counts the unknown dimensions up to the next one of a lower level, and is -1 where there
    is none so near, or where the dimension right before is unknown; `second` tells whether the one
    behind that is known too.
    """

    gap: Tensor
    second: Tensor

    @classmethod
    def of(cls, levels: Tensor) -> Self:
        """Works out what is of lower levels than each dimension, from levels (d,)."""
        length = len(levels)
        padded = torch.cat([levels, levels.new_full((MOST_GAP + 2,), int(levels.max()) + 1)])
        gap, second = torch.full_like(levels, -1), torch.zeros_like(levels, dtype=torch.bool)
        before = levels.roll(1) < levels
        before[:1] = False
        for number in range(MOST_GAP + 1):
            lower = padded[number + 1 : number + 1 + length] < levels
            found = before & lower & (gap < 0)
            gap[found] = number
            second |= found & (padded[number + 2 : number + 2 + length] < levels)
        return cls(gap, second)

    @property
    def any(self) -> bool:
        """Whether there is something ahead of any dimension."""
        return bool((self.gap >= 0).any())


def lookahead(probs: Tensor) -> Tensor:
    r"""Tabulates how likely what stands ahead is, given each class of a dimension.

    With trigrams, and g unknown dimensions in between,

    .. math:: m_0(x, v) = p(a \mid x, v)\, p(b \mid v, a), \qquad
        m_g(x, v) = \sum_w p(w \mid x, v)\, m_{g-1}(v, w)

    for the class x before the dimension, its own class v, and the classes a and b ahead. By Bayes'
    theorem these, times the probabilities of v after what is before it, are those given both
    sides, as far as trigrams tell.

    Args:
        probs: Probabilities (K, K, K) of a class after two others, the last axis the class's own;
            with at most :data:`MOST_CLASSES` classes.

    Returns:
        Logarithms (gaps, K, K + 1, K, K) for a gap, a, b or K where that is unknown, x and v.

    Example:
        >>> table = lookahead(torch.rand(3, 3, 3).softmax(dim=-1))
        >>> table.shape == (MOST_GAP + 1, 3, 4, 3, 3)
        True
    """
    # Entries [a, b, x, v]; b is unknown in the last.
    first = probs.permute(2, 0, 1).unsqueeze(1)
    second = probs.permute(1, 2, 0).unsqueeze(2)
    message = torch.cat([first * second, first], dim=1)
    tables = []
    for _ in range(MOST_GAP + 1):
        tables.append(message.log())
        message = torch.einsum("xvw,abvw->abxv", probs, message)
    return torch.stack(tables)
