"""Right-context messages: how likely what follows a dimension is, as trigrams see it."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["MOST_CLASSES", "MOST_GAP", "RightContext", "look_up", "right_context_messages"]

MOST_CLASSES = 64
"""Most classes of a table of messages, whose size is their fourth power."""

MOST_GAP = 5
"""Most unknown dimensions between one and its right context."""


class RightContext(NamedTuple):
    """The right context of dimensions (d,) under an ordering: what of lower levels follows them.

    `gap` counts the unknown dimensions up to the next one of a lower level, and is -1 where there
    is none so near, or where the dimension right before is unknown; `second` says whether the one
    behind that is known too.
    """

    gap: Tensor
    second: Tensor

    @classmethod
    def of(cls, levels: Tensor) -> Self:
        """Finds the right context of each dimension from levels (d,).

        Example:
            >>> RightContext.of(torch.tensor([0, 1, 2, 0, 1, 2])).gap
            tensor([-1,  1,  0, -1, -1, -1])
        """
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
        """Whether any dimension has a right context."""
        return bool((self.gap >= 0).any())


def right_context_messages(probs: Tensor) -> Tensor:
    r"""Tabulates how likely each right context is, given each class of a dimension.

    With trigrams, and g unknown dimensions in between,

    .. math:: m_0(x, v) = p(a \mid x, v)\, p(b \mid v, a), \qquad
        m_g(x, v) = \sum_w p(w \mid x, v)\, m_{g-1}(v, w)

    for the class x before the dimension, its own class v, and the classes a and b of the right
    context. By Bayes' theorem these, times the probabilities of v given what is before it, are the
    probabilities given both sides, up to a factor, as far as trigrams tell.

    Args:
        probs: Probabilities (K, K, K) of a class given two before it, the last axis the class's
            own; with at most :data:`MOST_CLASSES` classes.

    Returns:
        Log-likelihoods (gaps, K, K + 1, K, K) for a gap, a, b or K where that is unknown, x and v.

    Example:
        >>> table = right_context_messages(torch.rand(3, 3, 3).softmax(dim=-1))
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


def look_up(
    messages: Tensor,
    gap: Tensor,
    first: Tensor,
    second: Tensor,
    before: Tensor,
    left_out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Looks up how likely the right context of dimensions is, given each of their classes.

    Args:
        messages: What :func:`right_context_messages` made.
        gap: Unknown dimensions up to the right context (N,); below 0 where there is none.
        first: The first class of the right context (N,).
        second: The class behind it (N,), or K where it is unknown.
        before: The class right before the dimension (N,).
        left_out: To leave the values themselves out of the counts: the dimension's class (N,), the
            log-likelihood (N,) of the classes that did follow it up to those known, by trigrams,
            and the same without these occurrences, which takes its place.

    Returns:
        Log-likelihoods (N, K); 0 where there is no right context.
    """
    found = messages[gap.clamp(min=0), first, second, before]
    if left_out is not None:
        classes, whole, rest = left_out
        found = found.to(whole.dtype)
        of_own = found.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
        lost = (whole - of_own).exp() * -torch.expm1(rest - whole)
        of_own = of_own + torch.log1p(-lost.clamp(max=1 - 1e-6))
        found = found.scatter(-1, classes.unsqueeze(-1), of_own.unsqueeze(-1))
    return found.masked_fill((gap < 0).unsqueeze(-1), 0)
