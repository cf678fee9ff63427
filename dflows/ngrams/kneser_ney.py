"""Interpolated Kneser–Ney smoothing of counts, in a table for every order."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dflows.ngrams.counts import Packing

__all__ = ["FALLBACK", "Table", "find", "smooth"]

FALLBACK = (0.5, 1.0, 1.5)
"""Discounts where counts of counts give none, as of a few classes that are all frequent."""


@dataclass(frozen=True)
class Table:
    """Creates what the n-grams of one order add to a probability.

    There are two kinds of counts: how often an n-gram occurs, and, where a higher order uses it, in
    how many different classes it follows.

    Args:
        keys: N-grams (G,), sorted.
        last: The last class of every n-gram, and of none (G + 1,).
        contexts: Their contexts (C,), sorted.
        starts: Where the n-grams of every context begin, and where those of none would (C + 2,).
        shares: The discounted probability of every n-gram, and of none (kinds, G + 1).
        rests: What every context leaves to the next lower order, and none does (kinds, C + 1).
        counts: How often every n-gram was counted, and none was (kinds, G + 1).
        totals: How often every context was, and none was (kinds, C + 1).
        discounts: What is taken off counts of 0, 1, 2, and 3 or more (kinds, 4).
    """

    keys: Tensor
    last: Tensor
    contexts: Tensor
    starts: Tensor
    shares: Tensor
    rests: Tensor
    counts: Tensor
    totals: Tensor
    discounts: Tensor

    def leave_out(
        self,
        kind: Tensor | int,
        place: Tensor,
        ngram: Tensor,
        counted: Tensor | bool,
        rests: Tensor,
        shares: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes one occurrence off, where it was counted.

        Args:
            kind: Which counts are used, (N,) or of all rows.
            place: The place of the context (N,).
            ngram: The place of the n-gram (N,).
            counted: Whether its occurrence was counted, (N,) or of all rows, if it was at all.
            rests: What the contexts leave (N,).
            shares: The shares of all n-grams of the contexts (N, K).

        Returns:
            The same without it: what the contexts leave (N,), the shares (N, K), and what is then
            to be added to that of the n-gram itself (N,).
        """
        count, total = self.counts[kind, ngram], self.totals[kind, place]
        counted = counted & (count > 0)
        fewer = (count - 1).clamp(min=0)
        before = self.discounts[kind, count.clamp(max=3)]
        after = self.discounts[kind, fewer.clamp(max=3)]
        left = (total - 1).clamp(min=1)
        any_left = total > 1
        growth = torch.where(any_left, total / left, 0.0)
        rest = torch.where(any_left, (rests * total - before + after) / left, 1.0)
        share = torch.where(any_left, (fewer - after) / left, 0.0)
        lost = torch.where(counted, share - self.shares[kind, ngram] * growth, 0.0)
        rests = torch.where(counted, rest, rests)
        return rests, shares * torch.where(counted, growth, 1.0).unsqueeze(-1), lost


def smooth(
    keys: Sequence[Tensor], counts: Sequence[Tensor], packing: Packing, discount: float | None
) -> list[Table]:
    """Smooths the counts of all orders.

    Args:
        keys: The n-grams of every order, sorted.
        counts: How often each occurs.
        packing: How n-grams are held.
        discount: What is taken off every count; found from counts of counts where it is not given.

    Returns:
        A table for every order.
    """
    tables = []
    for m, occurrences in enumerate(counts):
        kinds = [occurrences]
        if m + 1 < packing.order:
            # Every n-gram of the next order is one more class that this one follows.
            places = torch.searchsorted(keys[m], keys[m + 1] & packing.mask(m + 1))
            kinds.append(places.bincount(minlength=len(keys[m])))
        tables.append(_table(keys[m], kinds, packing, discount))
    return tables


def _table(
    keys: Tensor, kinds: Sequence[Tensor], packing: Packing, discount: float | None
) -> Table:
    contexts, group, sizes = (keys >> packing.bits).unique_consecutive(
        return_inverse=True, return_counts=True
    )
    shares, rests, totals, taken = [], [], [], []
    for counts in kinds:
        taken.append(_discounts(counts, discount))
        discounts = taken[-1][counts.clamp(max=3)]
        sums = torch.zeros(2, len(contexts), dtype=torch.double, device=keys.device)
        sums.index_add_(1, group, torch.stack([counts.double(), discounts]))
        total, left = sums
        totals.append(total)
        shares.append((counts - discounts) / total.clamp(min=1)[group])
        rests.append(torch.where(total > 0, left / total, 1.0))
    return Table(
        keys,
        _padded(keys & packing.mask(1), 0),
        contexts,
        starts=torch.cat([sizes.new_zeros(1), sizes, sizes.new_zeros(1)]).cumsum(0),
        shares=_padded(torch.stack(shares), 0.0),
        rests=_padded(torch.stack(rests), 1.0),
        counts=_padded(torch.stack([*kinds]), 0),
        totals=_padded(torch.stack(totals), 0.0),
        discounts=torch.stack(taken),
    )


def _discounts(counts: Tensor, discount: float | None) -> Tensor:
    """Returns what is taken off counts of 0, 1, 2, and 3 or more."""
    found = [discount or 0.0] * 3
    if discount is None:
        n = [int((counts == number).sum()) for number in range(1, 5)]
        found = list(FALLBACK)
        if all(n):
            y = n[0] / (n[0] + 2 * n[1])
            estimated = [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)]
            if all(0 < value < k for k, value in enumerate(estimated, start=1)):
                found = estimated
    return torch.tensor([0.0, *found], dtype=torch.double, device=counts.device)


def find(table: Tensor, values: Tensor) -> Tensor:
    """Returns the places of values in a sorted table; its length for those that it has not."""
    if not len(table):
        return torch.zeros_like(values)
    place = torch.searchsorted(table, values.contiguous())
    found = table[place.clamp(max=len(table) - 1)] == values
    return torch.where(found, place, len(table))


def _padded(values: Tensor, value: float) -> Tensor:
    return F.pad(values, (0, 1), value=value)
