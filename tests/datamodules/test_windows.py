from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from datamodules import windows
from datamodules.splits import SplitRows, Splits
from datamodules.values import MemoryValues
from datamodules.windows import (
    ConsecutiveWindows,
    EvaluationBatches,
    RowsInOrder,
    ShuffledRows,
    ShuffledWindows,
    TrainingBatches,
    windows_in_order,
)

# Python 3.12 and later warn where a process with threads forks, as loaders do.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(params=["held", "computed"], autouse=True)
def order(request, monkeypatch):
    """The orders of epochs are held in memory, or of many windows computed place by place."""
    if request.param == "computed":
        monkeypatch.setattr(windows, "LARGEST_ORDER", 0)


def shuffled(size, length, seed=0):
    """The stream over the values 0..size-1."""
    return ShuffledWindows(MemoryValues(np.arange(size)), length, seed)


def consecutive(size, length, seed, streams):
    return ConsecutiveWindows(MemoryValues(np.arange(size)), length, seed, streams)


SIZES = [(4, 4), (5, 4), (7, 4), (8, 4), (11, 4), (12, 4), (100, 1), (100, 7), (101, 16)]


class TestShuffled:
    @pytest.mark.parametrize(("size", "length"), SIZES)
    def test_an_epoch_is_disjoint_windows(self, size, length):
        number = max(1, (size - length + 1) // length)
        rows = shuffled(size, length).read(0, 4 * number)
        assert rows.shape == (4 * number, length)
        assert (np.diff(rows) == 1).all()
        for epoch in rows.reshape(4, number * length):
            assert len(set(epoch)) == number * length
            assert 0 <= epoch.min() < epoch.max() + 1 <= size

    @pytest.mark.parametrize(("size", "length"), SIZES)
    def test_every_place_is_visited(self, size, length):
        rows = shuffled(size, length).read(0, 4000)
        assert len(np.unique(rows)) == size
        assert len(np.unique(rows[:, 0])) == size - length + 1

    def test_rows_depend_on_their_number_alone(self):
        stream = shuffled(100, 7)
        rows = stream.read(0, 200)
        for first in (187, 0, 1, 6, 13, 99):
            assert np.array_equal(stream.read(first, 13), rows[first : first + 13])

    def test_order_is_shuffled_and_depends_on_epoch_and_seed(self):
        first, second = shuffled(1000, 4).read(0, 2 * 249).reshape(2, -1)
        other = shuffled(1000, 4, seed=1).read(0, 249).reshape(-1)
        assert not np.array_equal(first, second - second[0] + first[0])
        assert not np.array_equal(first, other)
        assert not (np.diff(first) > 0).all()


def table(size, length):
    """The values of a table: row n is n, again and again."""
    return MemoryValues(np.repeat(np.arange(size), length))


class TestRows:
    # The orders of epochs are set for all examples alike.
    same = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

    @same
    @given(st.integers(10, 60), st.integers(1, 5), st.integers(0, 2**63 - 1), st.integers(1, 9))
    def test_an_epoch_visits_every_row_of_its_split_once(self, size, length, seed, batch):
        rows = Splits().of(size, "the table")["train"]
        stream = ShuffledRows(table(size, length), length, rows, seed)
        number = stream.rows_per_epoch
        assert number == len(rows)
        found = [stream.read(first, batch) for first in range(0, 3 * number, batch)]
        read = np.concatenate(found)[: 3 * number]
        assert (read == read[:, :1]).all()
        of_split = sorted(rows.at(np.arange(number)).tolist())
        for epoch in read[:, 0].reshape(3, number):
            assert sorted(epoch.tolist()) == of_split

    @same
    @given(st.integers(0, 2**63 - 1), st.integers(0, 300), st.integers(1, 40))
    def test_the_order_depends_on_the_seed_alone(self, seed, first, number):
        make = [ShuffledRows(table(100, 2), 2, SplitRows(0, 90, 100, 5), seed) for _ in range(2)]
        whole = make[0].read(0, first + number)
        assert np.array_equal(make[1].read(first, number), whole[first:])

    def test_every_epoch_and_every_seed_has_an_order_of_its_own(self):
        rows = SplitRows(0, 100, 100)
        first, second = ShuffledRows(table(100, 1), 1, rows, 0).read(0, 200).reshape(2, 100)
        other = ShuffledRows(table(100, 1), 1, rows, 1).read(0, 100).reshape(-1)
        assert len({tuple(order.tolist()) for order in (first, second, other, np.arange(100))}) == 4

    @pytest.mark.parametrize("block", [1, 7, 1000])
    def test_evaluation_has_the_order_of_the_table(self, block, monkeypatch):
        monkeypatch.setattr(windows, "BLOCK", block)
        for rows in Splits(folds=4, fold=1).of(50, "the table").values():
            expected = sorted(rows.at(np.arange(len(rows))).tolist())
            chunks = RowsInOrder(table(50, 3), 3, rows)
            for _ in range(2):
                found = np.concatenate(list(chunks)).reshape(-1, 3)
                assert found[:, 0].tolist() == expected
                assert (found == found[:, :1]).all()


class TestConsecutive:
    @pytest.mark.parametrize(("size", "length"), SIZES)
    @pytest.mark.parametrize("streams", [1, 3])
    def test_rows_go_on_in_a_ring(self, size, length, streams):
        rows = consecutive(size, length, 0, streams).read(0, size * streams)
        texts = rows.reshape(size, streams, length).swapaxes(0, 1).reshape(streams, -1)
        assert ((texts[:, 1:] - texts[:, :-1]) % size == 1).all()
        # The places are at equal distances, and every one is read equally often.
        distances = (texts[:, 0] - texts[0, 0]) % size
        assert distances.tolist() == [n * size // streams for n in range(streams)]
        assert (np.bincount(texts.ravel()) == length * streams).all()

    def test_rows_depend_on_number_and_seed(self):
        stream = consecutive(101, 7, 0, 5)
        rows = stream.read(0, 200)
        for first in (0, 1, 13, 99):
            assert np.array_equal(stream.read(first, 13), rows[first : first + 13])
        assert not np.array_equal(consecutive(101, 7, 1, 5).read(0, 200), rows)


class TestTrainingBatches:
    def rows(self, *, ranks=1, workers=0, batches=6, start=0, batch_size=12):
        """The rows of so many batches, in the order of training."""
        loaders = []
        for rank in range(ranks):
            dataset = TrainingBatches(shuffled(500, 5), batch_size // ranks, rank, ranks)
            dataset.start_at(start)
            loaders.append(
                islice(DataLoader(dataset, batch_size=None, num_workers=workers), batches)
            )
        return torch.cat([batch for together in zip(*loaders, strict=True) for batch in together])

    @pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (1, 3), (2, 0), (3, 0), (2, 2)])
    @pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
    def test_processes_and_workers_share_one_stream(self, ranks, workers):
        alone = self.rows()
        assert alone.dtype == torch.int64
        assert torch.equal(self.rows(ranks=ranks, workers=workers), alone)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_start(self, workers):
        expected = self.rows(batches=6)[36:]
        assert torch.equal(self.rows(batches=3, start=36, workers=workers), expected)

    @pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (1, 2)])
    @pytest.mark.parametrize("start", [0, 12, 24])
    def test_cycle(self, start, ranks, workers):
        alone = self.rows(batches=3).reshape(3, 12, 5)
        loaders = []
        for rank in range(ranks):
            dataset = TrainingBatches(shuffled(500, 5), 12 // ranks, rank, ranks, cycle=3)
            dataset.start_at(start)
            loader = DataLoader(dataset, batch_size=None, num_workers=workers)
            loaders.append(islice(loader, 8))
        found = [torch.cat(together) for together in zip(*loaders, strict=True)]
        expected = [alone[(start // 12 + number) % 3] for number in range(8)]
        assert torch.equal(torch.stack(found), torch.stack(expected))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_start_reaches_workers_that_run(self, workers):
        dataset = TrainingBatches(shuffled(500, 5), 4)
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
