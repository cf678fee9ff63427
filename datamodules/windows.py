"""Windows of fixed length: an endless stream to train on, and every place once to evaluate on.

Training rows are numbered from 0, and which row a number stands for depends on the seed alone. A
process or worker computes the numbers that are its own, so none needs to know the others, and a
resumed run begins at the number at which the other ended. Batches, not rows, are dealt out to the
workers of a process, so the number of workers changes nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.chunks import Array, Chunks, regroup
from datamodules.counter_rng import CounterRNG
from datamodules.splits import SplitRows
from datamodules.values import BLOCK, Values

__all__ = [
    "ConsecutiveWindows",
    "EvaluationBatches",
    "RowsInOrder",
    "ShuffledRows",
    "ShuffledWindows",
    "TrainingBatches",
    "TrainingStream",
    "windows_in_order",
]

LARGEST_ORDER = 1 << 20
"""Windows up to which the order of an epoch is held in memory, 8 bytes each."""


class TrainingStream(ABC):
    """An endless sequence of rows, numbered from 0.

    Args:
        length: The length of a row.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    @property
    def rows_per_epoch(self) -> int | None:
        """The rows that pass over the data once, or None where they have no end."""
        return None

    @abstractmethod
    def read(self, first: int, rows: int) -> Array:
        """Returns the rows of numbers `first`, `first` + 1, … (rows, length)."""


class _Order:
    """Creates an endless sequence of items: every epoch has all of them, in an order of its own.

    Args:
        size: The items, 0..size-1.
        seed: Each has orders of its own.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._seed = seed
        self._orders: dict[int, Array] = {}

    def read(self, first: int, number: int) -> tuple[Array, Array]:
        """Returns the epochs and the items of numbers `first`, `first` + 1, … (number,)."""
        epochs, places = np.divmod(np.arange(first, first + number), self.size)
        items = np.empty(number, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            items[chosen] = self._of_epoch(epoch, places[chosen])
        return epochs, items

    def _of_epoch(self, epoch: int, places: Array) -> Array:
        """Returns which items stand at places of an epoch's order."""
        random = CounterRNG(self._seed, epoch)
        if self.size > LARGEST_ORDER:
            return random.shuffled(places, self.size)
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = random.permutation(self.size)
        found: Array = self._orders[epoch][places]
        return found


class ShuffledWindows(TrainingStream):
    """Creates the shuffled windows of a sequence.

    An epoch visits disjoint windows in random order, as many as fit wherever they begin. Where the
    first begins is resampled for every epoch, so that windows are cut in all ways.

    Args:
        values: The sequence, at least `length` long.
        length: The length of a window.
        seed: Each has an order of its own.
    """

    def __init__(self, values: Values, length: int, seed: int) -> None:
        super().__init__(length)
        self._values = values
        self._seed = seed
        self._order = _Order(_windows_of_an_epoch(len(values), length), seed)

    @property
    def rows_per_epoch(self) -> int:
        """The windows of an epoch."""
        return self._order.size

    def read(self, first: int, rows: int) -> Array:
        epochs, windows = self._order.read(first, rows)
        most = len(self._values) - self._order.size * self.length
        kinds, which = np.unique(epochs, return_inverse=True)
        shifts = np.array([_shift(self._seed, int(epoch), most) for epoch in kinds])
        return self._values.windows(shifts[which] + self.length * windows, self.length)


class ShuffledRows(TrainingStream):
    """Creates the shuffled rows of a split of a table: an epoch visits every row once.

    Args:
        values: All rows of the table, one after the other.
        length: The length of a row.
        rows: Those of the split.
        seed: Each has an order of its own.
    """

    def __init__(self, values: Values, length: int, rows: SplitRows, seed: int) -> None:
        super().__init__(length)
        self._values = values
        self._rows = rows
        self._order = _Order(len(rows), seed)

    @property
    def rows_per_epoch(self) -> int:
        """The rows of the split."""
        return self._order.size

    def read(self, first: int, rows: int) -> Array:
        _, places = self._order.read(first, rows)
        return self._values.windows(self._rows.at(places) * self.length, self.length)


@dataclass(frozen=True)
class RowsInOrder:
    """Creates the numbers of the rows of a split, one row after the other, as the table has them.

    Args:
        values: All rows of the table, one after the other.
        length: The length of a row.
        rows: Those of the split.

    Example:
        >>> from datamodules.values import MemoryValues
        >>> table = MemoryValues(np.arange(6))
        >>> [chunk.tolist() for chunk in RowsInOrder(table, 2, SplitRows(1, 2, size=3))]
        [[2, 3, 4, 5]]
    """

    values: Values
    length: int
    rows: SplitRows

    def __iter__(self) -> Iterator[Array]:
        begin = 0
        for block in regroup(self.values, rows_at_once(self.length) * self.length):
            rows = block.reshape(-1, self.length)
            chosen = rows[self.rows.hold(np.arange(begin, begin + len(rows)))]
            begin += len(rows)
            if len(chosen):
                yield chosen.reshape(-1)


def rows_at_once(length: int) -> int:
    """Returns how many rows of a length are looked at together."""
    return max(1, BLOCK // length)


class ConsecutiveWindows(TrainingStream):
    """Creates consecutive windows of a sequence.

    It is read as a ring, from places at equal distances at once: row n + `streams` begins where row
    n ends, for ever. Behind the end stands the beginning, so that every place is read as often as
    any other, and in windows that are cut in all ways.

    Args:
        values: The sequence, at least `length` long.
        length: The length of a window.
        seed: Each begins at a place of its own.
        streams: The rows of a batch, over all processes.
    """

    def __init__(self, values: Values, length: int, seed: int, streams: int) -> None:
        super().__init__(length)
        self._values = values
        self._streams = streams
        self._begin = CounterRNG(seed).integer(len(values))

    @property
    def rows_per_epoch(self) -> int:
        """The windows that hold the sequence once."""
        return -(-len(self._values) // self.length)

    def read(self, first: int, rows: int) -> Array:
        steps, streams = np.divmod(np.arange(first, first + rows), self._streams)
        size = len(self._values)
        begins = self._begin + streams * size // self._streams + steps * self.length
        return self._values.windows(begins % size, self.length)


class TrainingBatches(IterableDataset[Tensor]):
    """Creates the endless batches of one process, LongTensors of shape (batch_size, length).

    Args:
        stream: The rows.
        batch_size: The rows of a batch.
        rank: The number of this process.
        ranks: How many processes there are. Together their batches number n are the rows from
            `start + n * ranks * batch_size` on, shared out in the order of ranks.
        cycle: Where it is given, the stream is only so many batches long, and begins again.
    """

    def __init__(
        self,
        stream: TrainingStream,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        cycle: int | None = None,
    ) -> None:
        self._stream = stream
        self._batch_size = batch_size
        self._rank = rank
        self._ranks = ranks
        self._cycle = cycle
        self._start = torch.zeros((), dtype=torch.int64).share_memory_()

    def start_at(self, row: int) -> None:
        """Sets the row with which the next iteration begins, for workers that run already too."""
        self._start.fill_(row)

    def __iter__(self) -> Iterator[Tensor]:
        worker, workers = _worker()
        together = self._ranks * self._batch_size
        start = int(self._start)
        for number in count(worker, workers):
            first = start + number * together
            if self._cycle is not None:
                first %= self._cycle * together
            rows = self._stream.read(first + self._rank * self._batch_size, self._batch_size)
            yield torch.from_numpy(rows.astype(np.int64))


class EvaluationBatches(IterableDataset[Tensor]):
    """Creates the batches of one process that together hold every number of a sequence once.

    Each is a LongTensor of shape (rows, length) with at most `batch_size` rows. The rest that fills
    no window comes last, as a batch of shape (1, rest). Batch number b is process b mod `ranks`'s.

    Args:
        chunks: The sequence.
        length: The length of a window.
        batch_size: The rows of a batch.
        rank: The number of this process.
        ranks: How many processes there are.
    """

    def __init__(
        self, chunks: Chunks, length: int, batch_size: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self._chunks = chunks
        self._length = length
        self._batch_size = batch_size
        self._rank = rank
        self._ranks = ranks

    def __iter__(self) -> Iterator[Tensor]:
        worker, workers = _worker()
        batches = windows_in_order(self._chunks, self._length, self._batch_size)
        own = islice(batches, self._rank + worker * self._ranks, None, workers * self._ranks)
        for rows in own:
            yield torch.from_numpy(rows.astype(np.int64))


def windows_in_order(chunks: Chunks, length: int, batch_size: int) -> Iterator[Array]:
    """Yields a sequence as batches of windows, and the rest that fills no window by itself.

    Example:
        >>> for batch in windows_in_order([np.arange(7)], length=3, batch_size=8):
        ...     print(batch.tolist())
        [[0, 1, 2], [3, 4, 5]]
        [[6]]
    """
    for values in regroup(chunks, length * batch_size):
        whole = len(values) // length * length
        if whole:
            yield values[:whole].reshape(-1, length)
        if whole < len(values):
            yield values[None, whole:]


def _windows_of_an_epoch(size: int, length: int) -> int:
    """Returns how many windows fit wherever the first begins, for up to length - 1 places."""
    return max(1, (size - length + 1) // length)


def _shift(seed: int, epoch: int, most: int) -> int:
    """Returns where the first window of an epoch begins, 0..most."""
    return CounterRNG(seed, epoch, 0, 0).integer(most + 1)


def _worker() -> tuple[int, int]:
    """Returns the number of this worker, and how many workers its process has."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)
