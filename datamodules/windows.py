"""Windows of fixed length: an endless stream to train on, and every place once to evaluate on.

Training rows are numbered from 0, and which row a number stands for depends on the seed alone. A
process or worker computes the numbers that are its own, so none needs to know the others, and a
resumed run begins at the number at which the other ended. Batches, not rows, are dealt out to the
workers of a process, so the number of workers changes nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.chunks import Array, Chunks, Cut, regroup
from datamodules.counter_rng import CounterRNG

__all__ = [
    "ConsecutiveWindows",
    "EvaluationBatches",
    "ShuffledWindows",
    "StreamedWindows",
    "TrainingBatches",
    "TrainingStream",
    "windows_in_order",
]

Reader: TypeAlias = Callable[[int, int], Array]
"""Takes a row's number and how many rows are wanted; returns them, shape (rows, length)."""


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
    def open(self) -> Reader:
        """Returns what reads rows; it is asked for growing numbers."""


class ShuffledWindows(TrainingStream):
    """Creates the shuffled windows of an array in memory.

    An epoch visits disjoint windows in random order, as many as fit wherever they begin. Where the
    first begins is resampled for every epoch, so that windows are cut in all ways.

    Args:
        values: The array, one dimension, at least `length` long.
        length: The length of a window.
        seed: Each has an order of its own.
    """

    def __init__(self, values: Array, length: int, seed: int) -> None:
        super().__init__(length)
        self._values = values
        self._seed = seed
        self._windows = _windows_of_an_epoch(len(values), length)
        self._epochs: dict[int, Array] = {}

    @property
    def rows_per_epoch(self) -> int:
        """The windows of an epoch."""
        return self._windows

    def open(self) -> Reader:
        """Returns what reads rows, of any number at any time."""
        return self._read

    def _read(self, first: int, rows: int) -> Array:
        epochs, places = np.divmod(np.arange(first, first + rows), self._windows)
        begins = np.empty(rows, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            begins[chosen] = self._begins(epoch)[places[chosen]]
        return np.lib.stride_tricks.sliding_window_view(self._values, self.length)[begins]

    def _begins(self, epoch: int) -> Array:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            order = CounterRNG(self._seed, epoch).permutation(self._windows)
            shift = _shift(self._seed, epoch, len(self._values) - self._windows * self.length)
            self._epochs[epoch] = shift + self.length * order
        return self._epochs[epoch]


class ConsecutiveWindows(TrainingStream):
    """Creates consecutive windows of an array in memory.

    The array is read as a ring, from places at equal distances at once: row n + `streams` begins
    where row n ends, for ever. Behind the end stands the beginning, so that every place is read as
    often as any other, and in windows that are cut in all ways.

    Args:
        values: The array, one dimension, at least `length` long.
        length: The length of a window.
        seed: Each begins at a place of its own.
        streams: The rows of a batch, over all processes.
    """

    def __init__(self, values: Array, length: int, seed: int, streams: int) -> None:
        super().__init__(length)
        self._values = values
        self._streams = streams
        self._begin = CounterRNG(seed).integer(len(values))

    @property
    def rows_per_epoch(self) -> int:
        """The windows that hold the array once."""
        return -(-len(self._values) // self.length)

    def open(self) -> Reader:
        """Returns what reads rows, of any number at any time."""
        return self._read

    def _read(self, first: int, rows: int) -> Array:
        steps, streams = np.divmod(np.arange(first, first + rows), self._streams)
        size = len(self._values)
        begins = self._begin + streams * size // self._streams + steps * self.length
        places: Array = (begins[:, None] + np.arange(self.length)) % size
        return self._values[places]


class StreamedWindows(TrainingStream):
    """Creates windows of a sequence that is read again in every epoch, for what exceeds memory.

    They are those of `ShuffledWindows`, in the order of reading, shuffled within blocks. To begin
    at a later row reads and drops what stands before it in that epoch.

    Args:
        chunks: The sequence.
        size: Its length, at least `length`.
        length: The length of a window.
        seed: Each has an order of its own.
        block: How many windows are shuffled together and held in memory.
    """

    def __init__(self, chunks: Chunks, size: int, length: int, seed: int, block: int) -> None:
        super().__init__(length)
        self._chunks = chunks
        self._size = size
        self._seed = seed
        self._block = block
        self._windows = _windows_of_an_epoch(size, length)

    @property
    def rows_per_epoch(self) -> int:
        """The windows of an epoch."""
        return self._windows

    def open(self) -> Reader:
        """Returns what reads rows, of numbers that grow."""
        blocks: Iterator[tuple[int, Array]] | None = None
        begin = 0
        block: Array = np.empty((0, self.length), np.int64)

        def read(first: int, rows: int) -> Array:
            nonlocal blocks, begin, block
            if blocks is None:
                blocks = self._blocks(first)
            found = []
            while rows:
                while first >= begin + len(block):
                    begin, block = next(blocks)
                found.append(block[first - begin : first - begin + rows])
                first += len(found[-1])
                rows -= len(found[-1])
            return np.concatenate(found)

        return read

    def _blocks(self, first: int) -> Iterator[tuple[int, Array]]:
        """Yields shuffled blocks with their first row's number, from the one with a row on."""
        epoch, place = divmod(first, self._windows)
        index = place // self._block
        while True:
            shift = _shift(self._seed, epoch, self._size - self._windows * self.length)
            end = shift + self._windows * self.length
            begin = shift + index * self._block * self.length
            for values in regroup(Cut(self._chunks, begin, end), self._block * self.length):
                windows = values.reshape(-1, self.length)
                order = CounterRNG(self._seed, epoch, index).permutation(len(windows))
                yield epoch * self._windows + index * self._block, windows[order]
                index += 1
            epoch, index = epoch + 1, 0


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
        read = self._stream.open()
        before = 0
        for number in count(worker, workers):
            first = start + number * together
            if self._cycle is not None:
                first %= self._cycle * together
                if first <= before:
                    read = self._stream.open()  # what has been opened is asked for growing numbers
                before = first
            rows = read(first + self._rank * self._batch_size, self._batch_size)
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
