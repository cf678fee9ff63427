"""N-grams in 64 bits, and how often they occur in data that come in chunks."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dflows.errors import UserError

__all__ = ["BLOCK", "Packing", "count_ngrams"]

BLOCK = 1 << 21
"""Classes that are counted at once."""


class Packing(NamedTuple):
    """How n-grams are held in 64 bits: the last class in the lowest `bits`, and so on.

    The highest of 64 bits may be the sign's: an arithmetic shift gives the context all the same,
    and sorted n-grams keep those of one context together.
    """

    bits: int
    order: int

    @classmethod
    def of(cls, num_classes: int, order: int) -> "Packing":
        """Packs up to `order` of so many classes.

        Raises:
            UserError: If 64 bits are too few.
        """
        bits = max((num_classes - 1).bit_length(), 1)
        if not 1 <= order <= 64 // bits:
            raise UserError(
                f"order is {order}: give 1 to {64 // bits}, since an n-gram is held in 64 bits "
                f"and one of {num_classes} classes takes {bits}"
            )
        return cls(bits, order)

    def mask(self, number: int) -> int:
        """Returns the bits of so many classes, fewer than fill 64."""
        return (1 << (self.bits * number)) - 1

    def ngrams(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields every order m with its n-grams (N, d - m + 1) in rows of classes (N, d)."""
        ngrams = rows
        for m in range(1, min(self.order, rows.shape[1]) + 1):
            if m > 1:
                ngrams = ngrams[:, 1:] | (rows[:, : 1 - m] << (self.bits * (m - 1)))
            yield m, ngrams

    def histories(self, x: Tensor, dimensions: Tensor | None = None) -> Tensor:
        """Packs the n - 1 classes before every dimension of x (N, d), or before some (m,).

        There are zeros where there is no class.
        """
        if dimensions is not None:
            reach = self.order - 1
            offsets = torch.arange(reach, device=x.device)
            before = F.pad(x, (reach, 0))[:, dimensions.unsqueeze(-1) + offsets]
            return (before << (self.bits * offsets.flip(0))).sum(dim=-1)
        packed = torch.zeros_like(x)
        for back in range(1, min(self.order, x.shape[1])):
            packed[:, back:] |= x[:, :-back] << (self.bits * (back - 1))
        return packed


def count_ngrams(
    chunks: Iterable[Any], num_classes: int, packing: Packing, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Counts the n-grams of all orders, in one pass.

    Args:
        chunks: Tensors or arrays of classes: of shape (d,), consecutive pieces of one text, however
            it is cut; or (N, d), independent events.
        num_classes: K.
        packing: How n-grams are held, and of which orders they are.
        device: Where to count.

    Returns:
        For every order the n-grams, sorted, and how often each occurs.

    Raises:
        UserError: If there is nothing to count, or a value is no class.
    """
    tallies = [_Tally(device) for _ in range(packing.order)]
    classes = (_classes(chunk, num_classes, device) for chunk in chunks)
    for rows, before in _blocks(classes, packing.order - 1, device):
        for m, ngrams in packing.ngrams(rows):
            # What is there for context alone was counted with the block before.
            tallies[m - 1].add(ngrams[:, max(before - m + 1, 0) :])
    found = [tally.total() for tally in tallies]
    if not len(found[0][0]):
        raise UserError("there is nothing to count: give at least one class")
    return found


def _classes(chunk: Any, num_classes: int, device: torch.device) -> Tensor:
    values = torch.as_tensor(chunk).to(device, torch.long)
    outside = values[(values < 0) | (values >= num_classes)]
    if len(outside):
        raise UserError(f"a value of {int(outside[0])} lies outside 0..{num_classes - 1}")
    return values


def _blocks(
    chunks: Iterable[Tensor], context: int, device: torch.device
) -> Iterator[tuple[Tensor, int]]:
    """Yields rows (N, d), and how many of their first classes were in the row before."""
    tail = torch.empty(0, dtype=torch.long, device=device)
    waiting: list[Tensor] = []
    size = 0
    for values in chunks:
        if values.ndim > 1:
            yield values, 0
            continue
        for part in values.split(BLOCK):
            waiting.append(part)
            size += len(part)
            if size >= BLOCK:
                row = torch.cat([tail, *waiting])
                yield row.unsqueeze(0), len(tail)
                tail = row[max(len(row) - context, 0) :]
                waiting, size = [], 0
    if size:
        yield torch.cat([tail, *waiting]).unsqueeze(0), len(tail)


class _Tally:
    """Creates counts of numbers that come in blocks."""

    def __init__(self, device: torch.device) -> None:
        nothing = torch.empty(0, dtype=torch.long, device=device)
        self._parts = [(nothing, nothing)]
        self._waiting = 0

    def add(self, values: Tensor) -> None:
        """Counts values once more each."""
        part = values.flatten().unique(return_counts=True)
        self._parts.append(part)
        self._waiting += len(part[0])
        # Merged when they have doubled, a number is moved a logarithm of times.
        if self._waiting > max(len(self._parts[0][0]), BLOCK):
            self._parts, self._waiting = [self.total()], 0

    def total(self) -> tuple[Tensor, Tensor]:
        """Returns the numbers, sorted, and their counts."""
        keys, counts = (torch.cat(part) for part in zip(*self._parts, strict=True))
        keys, places = keys.unique(return_inverse=True)
        return keys, torch.zeros_like(keys).index_add(0, places, counts)
