from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.windows import (
    ConsecutiveWindows,
    EvaluationBatches,
    ShuffledWindows,
    StreamedWindows,
    TrainingBatches,
    windows_in_order,
)

# Python 3.12 and later warn where a process with threads forks, as loaders do.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def streams(size, length, block=5, seed=0):
    """The two kinds of stream over the values 0..size-1."""
    values = np.arange(size)
    chunks = [values[:3], values[3:10], values[10:]]
    return [
        ShuffledWindows(values, length, seed),
        StreamedWindows(chunks, size, length, seed, block),
    ]


SIZES = [(4, 4), (5, 4), (7, 4), (8, 4), (11, 4), (12, 4), (100, 1), (100, 7), (101, 16)]


class TestStreams:
    @pytest.mark.parametrize(("size", "length"), SIZES)
    @pytest.mark.parametrize("kind", [0, 1])
    def test_an_epoch_is_disjoint_windows(self, kind, size, length):
        windows = max(1, (size - length + 1) // length)
        rows = streams(size, length)[kind].open()(0, 4 * windows)
        assert rows.shape == (4 * windows, length)
        assert (np.diff(rows) == 1).all()
        for epoch in rows.reshape(4, windows * length):
            assert len(set(epoch)) == windows * length
            assert 0 <= epoch.min() < epoch.max() + 1 <= size

    @pytest.mark.parametrize(("size", "length"), SIZES)
    @pytest.mark.parametrize("kind", [0, 1])
    def test_every_place_is_visited(self, kind, size, length):
        rows = streams(size, length)[kind].open()(0, 4000)
        assert len(np.unique(rows)) == size
        assert len(np.unique(rows[:, 0])) == size - length + 1

    @pytest.mark.parametrize(("size", "length"), SIZES)
    def test_both_kinds_cut_the_same_windows(self, size, length):
        memory, streamed = streams(size, length, seed=3)
        windows = max(1, (size - length + 1) // length)
        begins = [
            stream.open()(0, 6 * windows)[:, 0].reshape(6, -1) for stream in (memory, streamed)
        ]
        assert np.array_equal(*(np.sort(found) for found in begins))

    @pytest.mark.parametrize("kind", [0, 1])
    def test_rows_depend_on_their_number_alone(self, kind):
        stream = streams(100, 7)[kind]
        rows = stream.open()(0, 200)
        for first in (0, 1, 6, 13, 99, 187):
            assert np.array_equal(stream.open()(first, 13), rows[first : first + 13])
        read = stream.open()
        for first in range(2, 180, 17):
            assert np.array_equal(read(first, 9), rows[first : first + 9])

    @pytest.mark.parametrize("kind", [0, 1])
    def test_order_is_shuffled_and_depends_on_epoch_and_seed(self, kind):
        first, second = streams(1000, 4, block=100)[kind].open()(0, 2 * 249).reshape(2, -1)
        other = streams(1000, 4, block=100, seed=1)[kind].open()(0, 249).reshape(-1)
        assert not np.array_equal(first, second - second[0] + first[0])
        assert not np.array_equal(first, other)
        assert not (np.diff(first) > 0).all()

    def test_blocks_are_read_in_order(self):
        begins = streams(1000, 4, block=50)[1].open()(0, 200)[:, 0].reshape(4, 50)
        assert (begins[1:].min(1) > begins[:-1].max(1)).all()


class TestConsecutive:
    @pytest.mark.parametrize(("size", "length"), SIZES)
    @pytest.mark.parametrize("streams", [1, 3])
    def test_rows_go_on_in_a_ring(self, size, length, streams):
        values = np.arange(size) * 2
        rows = ConsecutiveWindows(values, length, 0, streams).open()(0, size * streams)
        texts = rows.reshape(size, streams, length).swapaxes(0, 1).reshape(streams, -1) // 2
        assert ((texts[:, 1:] - texts[:, :-1]) % size == 1).all()
        # The places are at equal distances, and every one is read equally often.
        distances = (texts[:, 0] - texts[0, 0]) % size
        assert distances.tolist() == [n * size // streams for n in range(streams)]
        assert (np.bincount(texts.ravel()) == length * streams).all()

    def test_rows_depend_on_number_and_seed(self):
        stream = ConsecutiveWindows(np.arange(101), 7, 0, 5)
        rows = stream.open()(0, 200)
        for first in (0, 1, 13, 99):
            assert np.array_equal(stream.open()(first, 13), rows[first : first + 13])
        assert not np.array_equal(ConsecutiveWindows(np.arange(101), 7, 1, 5).open()(0, 200), rows)


class TestTrainingBatches:
    def rows(self, *, ranks=1, workers=0, batches=6, start=0, kind=0, batch_size=12):
        """The rows of so many batches, in the order of training."""
        loaders = []
        for rank in range(ranks):
            dataset = TrainingBatches(streams(500, 5)[kind], batch_size // ranks, rank, ranks)
            dataset.start_at(start)
            loaders.append(
                islice(DataLoader(dataset, batch_size=None, num_workers=workers), batches)
            )
        return torch.cat([batch for together in zip(*loaders, strict=True) for batch in together])

    @pytest.mark.parametrize("kind", [0, 1])
    @pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (1, 3), (2, 0), (3, 0), (2, 2)])
    @pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
    def test_processes_and_workers_share_one_stream(self, ranks, workers, kind):
        alone = self.rows(kind=kind)
        assert alone.dtype == torch.int64
        assert torch.equal(self.rows(ranks=ranks, workers=workers, kind=kind), alone)

    @pytest.mark.parametrize("kind", [0, 1])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_start(self, workers, kind):
        expected = self.rows(batches=6)[36:] if kind == 0 else self.rows(batches=6, kind=1)[36:]
        assert torch.equal(self.rows(batches=3, start=36, workers=workers, kind=kind), expected)

    @pytest.mark.parametrize("kind", [0, 1])
    @pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (1, 2)])
    @pytest.mark.parametrize("start", [0, 12, 24])
    def test_cycle(self, start, ranks, workers, kind):
        alone = self.rows(batches=3, kind=kind).reshape(3, 12, 5)
        loaders = []
        for rank in range(ranks):
            dataset = TrainingBatches(streams(500, 5)[kind], 12 // ranks, rank, ranks, cycle=3)
            dataset.start_at(start)
            loader = DataLoader(dataset, batch_size=None, num_workers=workers)
            loaders.append(islice(loader, 8))
        found = [torch.cat(together) for together in zip(*loaders, strict=True)]
        expected = [alone[(start // 12 + number) % 3] for number in range(8)]
        assert torch.equal(torch.stack(found), torch.stack(expected))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_start_reaches_workers_that_run(self, workers):
        dataset = TrainingBatches(streams(500, 5)[0], 4)
        loader = DataLoader(
            dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )
        first = list(islice(loader, 5))
        dataset.start_at(8)
        again = list(islice(loader, 3))
        assert torch.equal(torch.stack(again), torch.stack(first[2:]))


class TestEvaluation:
    @pytest.mark.parametrize("size", [1, 4, 5, 23, 24, 100])
    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_in_order(self, size, batch_size):
        values = np.arange(size)
        batches = list(windows_in_order([values[:2], values[2:]], 4, batch_size))
        assert np.array_equal(np.concatenate([batch.ravel() for batch in batches]), values)
        whole, rest = divmod(size, 4)
        shapes = [batch.shape for batch in batches]
        assert all(rows <= batch_size for rows, _ in shapes)
        assert sum(rows for rows, length in shapes if length == 4) == whole
        assert [shape for shape in shapes if shape[1] != 4] == ([(1, rest)] if rest else [])

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("size", [3, 83, 88])
    def test_everything_once(self, ranks, workers, size):
        found = []
        for rank in range(ranks):
            dataset = EvaluationBatches([np.arange(size)], 4, 3, rank, ranks)
            loader = DataLoader(dataset, batch_size=None, num_workers=workers)
            for _ in range(2 if workers == 0 else 1):
                batches = list(loader)
            found += [value for batch in batches for value in batch.flatten().tolist()]
        assert sorted(found) == list(range(size))
