"""Sequences that may be longer than memory: one-dimensional arrays read one after the other."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Chunks", "Cut", "count", "regroup"]

Array: TypeAlias = NDArray[np.integer]

Chunks: TypeAlias = Iterable[Array]
"""Consecutive arrays of one dimension. It can be iterated as often as wanted."""


@dataclass(frozen=True)
class Cut:
    """Creates the chunks of the places low..high-1 of others.

    Example:
        >>> [chunk.tolist() for chunk in Cut([np.arange(4), np.arange(4, 6)], 2, 5)]
        [[2, 3], [4]]
    """

    chunks: Chunks
    low: int
    high: int

    def __iter__(self) -> Iterator[Array]:
        begin = 0
        for chunk in self.chunks:
            if begin >= self.high:
                break
            part = chunk[max(0, self.low - begin) : self.high - begin]
            if len(part):
                yield part
            begin += len(chunk)


def regroup(chunks: Chunks, size: int) -> Iterator[Array]:
    """Yields the same numbers in chunks of one size, the last of which may be shorter.

    Example:
        >>> [chunk.tolist() for chunk in regroup([np.arange(3), np.arange(3, 5)], 2)]
        [[0, 1], [2, 3], [4]]
    """
    waiting: list[Array] = []
    missing = size
    for chunk in chunks:
        begin = 0
        while len(chunk) - begin >= missing:
            waiting.append(chunk[begin : begin + missing])
            begin += missing
            yield np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
            waiting, missing = [], size
        if begin < len(chunk):
            waiting.append(chunk[begin:])
            missing -= len(chunk) - begin
    if waiting:
        yield np.concatenate(waiting)


def count(chunks: Chunks) -> NDArray[np.int64]:
    """Returns how often each number from 0 to the largest occurs."""
    total = np.zeros(0, np.int64)
    for chunk in chunks:
        counts = np.bincount(chunk)
        if len(counts) < len(total):
            total[: len(counts)] += counts
        else:
            counts[: len(total)] += total
            total = counts
    return total
