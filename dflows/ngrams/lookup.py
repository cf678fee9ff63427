"""The tables of all orders in one, for many look-ups one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from dflows.ngrams.counts import Packing
from dflows.ngrams.kneser_ney import Table, find

__all__ = ["Lookup"]


@dataclass(frozen=True)
class Lookup:
    """Creates the joined tables of all orders.

    A context of m - 1 classes is held as these and a bit of 1 before them, so that all orders are
    found by one search.

    Args:
        num_classes: K.
        masks: The bits of a context of every order (n,).
        marks: The bit before them (n,).
        contexts: The contexts of all orders (C,), sorted.
        starts: Where the n-grams of every context begin, and of none (C + 1,).
        sizes: How many they are (C + 1,).
        rests: What every context leaves to the next lower order, and none does, by the counts of an
            order that is the highest to be used, and of one that is not (2, C + 1).
        last: The last class of every n-gram, and of none (G + 1,).
        shares: The discounted probability of every n-gram, and of none (2, G + 1).
    """

    num_classes: int
    masks: Tensor
    marks: Tensor
    contexts: Tensor
    starts: Tensor
    sizes: Tensor
    rests: Tensor
    last: Tensor
    shares: Tensor

    @classmethod
    def of(
        cls, tables: Sequence[Table], packing: Packing, num_classes: int, device: torch.device
    ) -> Self:
        """Joins tables, one of every order, or none of what was not counted."""
        masks = [packing.mask(m) for m in range(len(tables))]
        marks = [1 << packing.bits * m for m in range(len(tables))]
        # In two's complement the highest of 64 bits is the sign's.
        marks = [mark - (1 << 64) if mark >> 63 else mark for mark in marks]
        nothing = torch.empty(0, dtype=torch.long, device=device)
        marked = [
            (table.contexts & mask) | mark
            for table, mask, mark in zip(tables, masks, marks, strict=True)
        ]
        contexts, order = torch.cat([nothing, *marked]).sort()
        sizes = torch.cat([nothing, *(table.starts.diff()[:-1] for table in tables)])
        starts = sizes.cumsum(0) - sizes
        none = torch.empty(2, 0, dtype=torch.double, device=device)
        rests = torch.cat([none, *(table.rests[[0, -1], :-1] for table in tables)], dim=1)
        shares = torch.cat([none, *(table.shares[[0, -1], :-1] for table in tables)], dim=1)
        return cls(
            num_classes,
            torch.tensor(masks, dtype=torch.long, device=device),
            torch.tensor(marks, dtype=torch.long, device=device),
            contexts,
            F.pad(starts[order], (0, 1)),
            F.pad(sizes[order], (0, 1)),
            F.pad(rests[:, order], (0, 1), value=1.0),
            F.pad(torch.cat([nothing, *(table.last[:-1] for table in tables)]), (0, 1)),
            F.pad(shares, (0, 1)),
        )

    def next_probs(self, history: Tensor, seen: Tensor) -> Tensor:
        """Computes the probabilities (N, K) of all classes to come next.

        Args:
            history: The classes before (N,), packed as :meth:`dflows.ngrams.NGrams.pack` does.
            seen: How many classes before are known (N,).
        """
        orders = torch.arange(len(self.masks), device=history.device)
        seen = seen.clamp(max=len(orders) - 1).unsqueeze(-1)
        place = find(self.contexts, (history.unsqueeze(-1) & self.masks) | self.marks)
        place = place.masked_fill(orders > seen, len(self.contexts))
        kind = (orders < seen).long()
        # A share counts for what the higher orders leave.
        left = F.pad(self.rests[kind, place], (0, 1), value=1.0).flip(1).cumprod(1).flip(1)
        classes = torch.arange(self.num_classes, device=history.device)
        ngrams = self.starts[place].unsqueeze(-1) + classes
        ngrams = torch.where(
            classes < self.sizes[place].unsqueeze(-1), ngrams, self.shares.shape[1] - 1
        )
        shares = self.shares[kind.unsqueeze(-1), ngrams] * left[:, 1:].unsqueeze(-1)
        probs = (left[:, :1] / self.num_classes).repeat(1, self.num_classes)
        return probs.scatter_add(1, self.last[ngrams].flatten(1), shares.flatten(1))
