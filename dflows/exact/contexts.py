"""One evaluation of a network for every context, where many states share one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from dflows.conditioner import Conditioner, evaluated_by
from dflows.representations import full_precision, is_one_hot

__all__ = ["each_context_once"]

MOST_CONTEXTS = 2**62


def _distinct(lower: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Finds the distinct rows of values (N, n).

    Returns:
        The numbers (C,) of rows that hold all of them, and which of these each row equals (N,).
    """
    powers = num_classes ** torch.arange(lower.shape[1], device=lower.device)
    number, which = (lower * powers).sum(dim=-1).unique(return_inverse=True)
    rows = torch.arange(len(lower), device=lower.device)
    return rows.new_empty(len(number)).scatter_(0, which, rows), which


def _logits(conditioner: Conditioner, y: Tensor, first_level: int) -> Tensor | None:
    """Computes the logits (N, d, num_logits), or None where that would take as many evaluations.

    The logits of a dimension depend on those of lower levels alone, and among all states few values
    of these are different: half of the dimensions have the square root of the states.
    """
    if is_one_hot(y):  # values with a gradient, of a row's own
        return None
    layout = conditioner.layout(y.shape[1], y.device)
    distinct, count = [], 0
    for level in range(first_level, len(layout.members)):
        lower = y[:, layout.levels < level]
        if conditioner.num_classes ** lower.shape[1] > MOST_CONTEXTS:
            return None
        distinct.append(_distinct(lower, conditioner.num_classes))
        count += len(distinct[-1][0])
    if count >= len(y):
        return None
    # All logits there are, after a row of zeros for the levels below the first; and which of them
    # those of every row and dimension are.
    table = [full_precision(conditioner.head.weight).new_zeros(1, conditioner.num_logits)]
    number, first = torch.zeros_like(y), 1
    for level, (rows, which) in enumerate(distinct, first_level):
        table.append(conditioner.level_logits(y[rows], level).flatten(0, 1))
        dimensions = layout.members[level]
        member = torch.arange(len(dimensions), device=y.device)
        number[:, dimensions] = first + which.unsqueeze(-1) * len(dimensions) + member
        first += len(table[-1])
    return F.embedding(number, torch.cat(table))


@contextmanager
def each_context_once() -> Iterator[None]:
    """Makes conditioners evaluate every context of a batch once, without gradients.

    The logits are the same.

    Example:
        >>> import dflows.flows
        >>> flow = dflows.flows.bipartite(num_classes=3, length=4).eval()
        >>> y = torch.cartesian_prod(*[torch.arange(3)] * 4)
        >>> with each_context_once():  # 9 of the 81 rows, in each transform
        ...     log_prob = flow.log_prob(y)
        >>> torch.allclose(log_prob, flow.log_prob(y), atol=1e-5)
        True
    """
    with evaluated_by(_logits), torch.no_grad():
        yield
