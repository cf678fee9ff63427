"""Rows of integers, from a file or from memory: batches, splits, exact resume, and bad input."""

import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import ArrayDataModule, IntegerVocabulary, Splits
from dflows.errors import UserError
from dflows.reporting import Score
from tests.datamodules.process import Process

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

SIZE = 50
# Row n is n and two of its digits, so that every row is another one.
ROWS = np.stack([np.arange(SIZE), np.arange(SIZE) % 10, np.arange(SIZE) // 10], axis=1)
GIVEN = {"train": ROWS[:30], "valid": ROWS[30:37], "test": ROWS[37:]}


@pytest.fixture(params=["memory", "npy", "npz"])
def source(request, tmp_path):
    """The rows, wherever they may lie."""
    if request.param == "memory":
        return ROWS
    path = tmp_path / f"rows.{request.param}"
    if request.param == "npy":
        np.save(path, ROWS.astype("uint8"))
    else:
        np.savez_compressed(path, rows=ROWS)
    return str(path)


def firsts(batches):
    """The first column of batches, which says which rows they are."""
    return [int(row[0]) for batch in batches for row in batch]


class TestRows:
    def test_are_the_same_wherever_they_lie(self, source):
        data, other = ArrayDataModule(source, batch_size=7), ArrayDataModule(ROWS, batch_size=7)
        assert (data.length, data.num_classes, data.is_text) == (3, 50, False)
        assert data.vocabulary == IntegerVocabulary(50)
        batches = [list(islice(one.train_dataloader(), 20)) for one in (data, other)]
        assert torch.equal(*map(torch.stack, batches))
        assert batches[0][0].shape == (7, 3)
        assert batches[0][0].dtype == torch.int64
        for split in ("valid", "test"):
            assert torch.equal(*(torch.cat(list(loader(one, split))) for one in (data, other)))

    @given(st.integers(10, 60), st.integers(0, 2**63 - 1), st.integers(0, 9), st.integers(1, 9))
    @settings(deadline=None, max_examples=50)
    def test_every_row_of_a_split_is_visited_once_an_epoch(self, size, seed, order, batch_size):
        table = np.arange(2 * size).reshape(size, 2)
        data = ArrayDataModule(table, batch_size, splits=Splits(seed=order), seed=seed)
        number = data.rows()
        visited = firsts(islice(data.train_dataloader(), -(-2 * number // batch_size)))
        first, second = sorted(visited[:number]), sorted(visited[number : 2 * number])
        evaluated = firsts(data.val_dataloader()) + firsts(data.test_dataloader())
        assert first == second
        assert sorted(first + evaluated) == list(range(0, 2 * size, 2))

    def test_evaluation_has_the_order_of_the_array(self, source):
        data = ArrayDataModule(source, eval_batch_size=2)
        for split in ("valid", "test"):
            rows = torch.cat(list(loader(data, split)))
            assert len(rows) == data.rows(split) == 5
            assert rows[:, 0].tolist() == sorted(rows[:, 0].tolist())
            assert (rows.numpy() == ROWS[rows[:, 0]]).all()

    def test_the_splits_stay_when_the_seed_of_training_changes(self):
        one, other, moved = (
            ArrayDataModule(ROWS, seed=seed, splits=Splits(seed=order))
            for seed, order in ((0, 0), (1, 0), (0, 1))
        )
        assert firsts(one.test_dataloader()) == firsts(other.test_dataloader())
        assert firsts(one.test_dataloader()) != firsts(moved.test_dataloader())
        orders = [firsts(islice(data.train_dataloader(), 1)) for data in (one, other)]
        assert orders[0] != orders[1]

    def test_classes_are_counted(self, source):
        data = ArrayDataModule(source, splits=Splits(folds=5, fold=3))
        counts = [data.class_counts(split) for split in ("train", "valid", "test")]
        assert torch.equal(sum(counts), torch.from_numpy(np.bincount(ROWS.ravel())))
        tested = torch.cat(list(data.test_dataloader()))
        assert torch.equal(counts[2], tested.flatten().bincount(minlength=50))


def loader(data, split):
    return data.val_dataloader() if split == "valid" else data.test_dataloader()


class TestGivenSplits:
    def check(self, data):
        assert sorted(firsts(islice(data.train_dataloader(), 1))) == list(range(30))
        assert firsts(data.val_dataloader()) == list(range(30, 37))
        assert firsts(data.test_dataloader()) == list(range(37, 50))
        assert data.num_classes == 50  # of the test split, too

    def test_as_arrays_or_tensors(self):
        self.check(ArrayDataModule(GIVEN, batch_size=30))
        tensors = {split: torch.tensor(rows) for split, rows in GIVEN.items()}
        self.check(ArrayDataModule(tensors, batch_size=30))

    def test_as_files(self, tmp_path):
        for split, rows in GIVEN.items():
            np.save(tmp_path / f"{split}.npy", rows)
        paths = {split: str(tmp_path / f"{split}.npy") for split in GIVEN}
        self.check(ArrayDataModule(paths, batch_size=30))

    def test_as_names_in_a_file(self, tmp_path):
        path = str(tmp_path / "all.npz")
        np.savez(path, labels=np.zeros(3), **GIVEN)
        self.check(ArrayDataModule(path, batch_size=30))
        swapped = {"train": f"{path}:train", "valid": f"{path}:test", "test": f"{path}:valid"}
        assert firsts(ArrayDataModule(swapped).test_dataloader()) == list(range(30, 37))


class TestProcesses:
    @pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (3, 2)])
    def test_and_workers_share_one_stream(self, ranks, workers, source):
        alone = torch.cat(list(islice(ArrayDataModule(ROWS, 12).train_dataloader(), 8)))
        loaders = []
        for rank in range(ranks):
            data = ArrayDataModule(source, 12 // ranks, num_workers=workers)
            data.trainer = Process(rank, ranks)
            loaders.append(islice(data.train_dataloader(), 8))
        shared = [batch for together in zip(*loaders, strict=True) for batch in together]
        assert torch.equal(torch.cat(shared), alone)

    @pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2), (3, 0), (7, 0)])
    def test_evaluate_every_row_once(self, ranks, workers, source):
        found = []
        for rank in range(ranks):
            data = ArrayDataModule(source, eval_batch_size=2, num_workers=workers)
            data.trainer = Process(rank, ranks)
            found += firsts(data.test_dataloader())
        assert sorted(found) == firsts(ArrayDataModule(ROWS).test_dataloader())


class Recorder(pl.LightningModule):
    """A module that keeps the rows that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen += firsts([batch])
        return self.weight * batch.float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(source, folder, *, workers=0, ckpt_path=None, **limit):
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_epochs": -1, **limit},
    )
    trainer.fit(module, ArrayDataModule(source, 6, num_workers=workers), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "end.ckpt")
    return module.seen


class TestTraining:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_resumes_with_the_row_that_comes_next(self, workers, source, tmp_path):
        whole = fit(ROWS, tmp_path, max_steps=20)
        before = fit(source, tmp_path, workers=workers, max_steps=9)
        after = fit(source, tmp_path, max_steps=20, ckpt_path=tmp_path / "end.ckpt")
        assert before + after == whole

    def test_an_epoch_has_every_row_and_is_filled_up_from_the_next(self, tmp_path):
        seen = fit(ROWS, tmp_path, max_epochs=2)
        assert len(seen) == 2 * 42  # 40 rows, in batches of 6
        assert sorted(seen[:40]) == sorted(seen[40:80])
        assert len(set(seen[:40])) == 40

    def test_a_checkpoint_of_other_classes_is_refused(self, tmp_path):
        fit(ROWS, tmp_path, max_steps=1)
        with pytest.raises(UserError, match=r"another vocabulary \(50 symbols, here 10\)"):
            fit(ROWS % 10, tmp_path, max_steps=2, ckpt_path=tmp_path / "end.ckpt")


class TestClasses:
    def test_are_two_at_least(self):
        assert ArrayDataModule(np.zeros((10, 3), int)).num_classes == 2

    def test_may_be_more_than_occur(self):
        data = ArrayDataModule(ROWS, num_classes=60)
        assert data.num_classes == len(data.class_counts("test")) == 60

    @pytest.mark.parametrize("split", ["train", "valid", "test"])
    def test_are_looked_at_in_every_split_before_training(self, split):
        rows = {**GIVEN, split: np.where(GIVEN[split] == GIVEN[split][2, 0], -1, GIVEN[split])}
        data = ArrayDataModule(rows)
        for stage in ("fit", "validate", "test"):
            with pytest.raises(UserError, match=r"row \d+, column \d \(from 0\), is -1"):
                data.setup(stage)


def test_a_row_is_reported_in_nats():
    data = ArrayDataModule(ROWS)
    report = data.report(Score("test", bpc=2.0, characters=15, examples=5))
    assert ("test, nats per row", "4.1589", "") in report.rows  # 3 columns of 2 bits
    assert report.metrics.keys() == {"unigram_bpc"}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (ROWS, {"num_classes": 49}, "row 49, column 0 (from 0), is 49, and num_classes is 49"),
        (ROWS, {"num_classes": 1}, "num_classes must be at least 2, not 1"),
        (ROWS, {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        (ROWS[:5], {}, "leave no row of the 5 of the array to valid"),
        (ROWS[:4], {"splits": Splits(folds=5)}, "the array has 4 rows, fewer than the 5 folds"),
        (GIVEN, {"splits": Splits()}, "path gives the arrays of train, valid and test, and splits"),
        ({"train": ROWS}, {}, "path gives the arrays of train: give one for each of train, valid"),
        ({}, {}, "path gives the arrays of no split: give one for each"),
        (
            {**GIVEN, "test": ROWS[:, :2]},
            {},
            "the array of test, the array, has 2 columns, and that of train, the array, has 3",
        ),
        ({**GIVEN, "valid": ROWS / 2}, {}, "holds float64 values, and row 1, column 0 (from 0)"),
        ("missing.npy", {}, "cannot read missing.npy: No such file or directory: give the file"),
        ("missing.npz:rows", {}, "cannot read missing.npz:rows: No such file or directory"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(source, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ArrayDataModule(source, **options).setup("fit")


def test_the_columns_of_a_checkpoint_are_the_same():
    data = ArrayDataModule(ROWS)
    data.check_length(3)
    with pytest.raises(UserError, match="the array has 3 columns, and the model of the checkpoint"):
        data.check_length(4)


@pytest.mark.slow
def test_a_gigabyte_takes_no_more_memory_than_a_megabyte(tmp_path):
    """A file with holes, which takes no place on the disk; all its values are 0 but the last."""
    rows = 1 << 24
    array = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", "uint8", (rows, 64))
    array[-1] = 7
    del array
    assert (tmp_path / "a.npy").stat().st_size > 1 << 30

    def peak():
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    small = ArrayDataModule(np.zeros((1 << 14, 64), "uint8"), 64)
    small.setup("fit")
    small.class_counts()
    for batch in islice(small.train_dataloader(), 100):
        assert batch.shape == (64, 64)
    before = peak()
    data = ArrayDataModule(str(tmp_path / "a.npy"), 64)
    data.setup("fit")
    assert data.num_classes == 8
    assert int(data.class_counts().sum()) == 64 * data.rows()
    for batch in islice(data.train_dataloader(), 1000):
        assert batch.shape == (64, 64)
    for batch in islice(data.test_dataloader(), 1000):
        assert batch.shape == (256, 64)
    assert peak() - before < 1 << 26
