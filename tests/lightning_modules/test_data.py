"""What a module learns of any data: asked of them, else read in them without leaving a trace."""

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from datamodules import AdditionDataModule, FullRankDataModule
from dflows.errors import UserError
from lightning_modules.data import DataFacts, unpack
from tests.training import trainer as make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

K = 5
X = torch.randint(K, (70, 3), generator=torch.Generator().manual_seed(0))


class Model(pl.LightningModule):
    """A module that asks for facts when it is set up, and keeps its batches."""

    def __init__(self, ask=lambda facts: facts.class_counts(K)):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.ask = ask
        self.batches = []

    def setup(self, stage):
        self.facts = DataFacts(self.trainer)
        self.answer = self.ask and self.ask(self.facts)

    def training_step(self, batch, batch_idx):
        y, _ = unpack(batch)
        self.batches.append((y, torch.rand(()), np.random.rand(), random.random()))  # noqa: NPY002
        return self.weight * y.float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Endless(IterableDataset):
    """Batches without end or length."""

    def __iter__(self):
        while True:
            yield X[:7]


class OneShot(IterableDataset):
    """An iterator that is gone once it is read."""

    def __init__(self):
        self.batches = iter(X.split(7))

    def __iter__(self):
        return self.batches


class Ordinary(pl.LightningDataModule):
    """A datamodule that knows nothing of us."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(X), batch_size=10)


def fit(tmp_path, loader, ask=lambda facts: facts.class_counts(K), steps=4, **options):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    module = Model(ask)
    trainer = make_trainer(tmp_path, steps, **{"limit_val_batches": 0, **options})
    if isinstance(loader, pl.LightningDataModule):
        trainer.fit(module, datamodule=loader)
    else:
        trainer.fit(module, loader)
    return module


COUNTS = X.flatten().bincount(minlength=K)

LOADERS = {
    "tensor": lambda: DataLoader(X, batch_size=10),
    "dataset": lambda: DataLoader(TensorDataset(X), batch_size=10, shuffle=True),
    "workers": lambda: DataLoader(
        TensorDataset(X), batch_size=10, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "generator": lambda: DataLoader(
        TensorDataset(X), batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "context": lambda: DataLoader(TensorDataset(X, X.float()), batch_size=10),
    "bytes": lambda: DataLoader(TensorDataset(X.to(torch.uint8)), batch_size=10),
    "list": lambda: list(X.split(10)),
    "ordinary": Ordinary,
}


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "list"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_classes_are_counted_without_a_trace(kind, tmp_path):
    counted = fit(tmp_path, LOADERS[kind]())
    assert torch.equal(counted.answer, COUNTS)
    assert not counted.facts.stateful
    assert not counted.facts.is_text
    assert counted.facts.entropy is None
    assert counted.facts.training_chunks() is None
    plain = fit(tmp_path, LOADERS[kind](), ask=None)
    assert len(plain.batches) == 4
    for found, expected in zip(counted.batches, plain.batches, strict=True):
        assert torch.equal(found[0], expected[0])
        assert found[1:] == expected[1:]


def test_counting_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.data.MOST_VALUES", 50)
    module = fit(tmp_path, DataLoader(Endless(), batch_size=None))
    assert torch.equal(module.answer, 3 * X[:7].flatten().bincount(minlength=K))


def test_what_can_be_read_once_is_left_alone(tmp_path):
    with pytest.warns(UserWarning, match="can be iterated once only"):
        module = fit(tmp_path, DataLoader(OneShot(), batch_size=None))
    assert module.answer is None
    assert torch.equal(torch.cat([batch[0] for batch in module.batches]), X[:28])
    ask = lambda facts: list(facts.training_batches(8))  # noqa: E731
    with (
        pytest.warns(UserWarning, match="can be iterated once only"),
        pytest.raises(UserError, match="give a DataLoader, or a data set that can be iterated ag"),
    ):
        fit(tmp_path, DataLoader(OneShot(), batch_size=None), ask)


def test_a_datamodule_is_asked(tmp_path):
    data = FullRankDataModule(3, K, batch_size=4, eval_batch_size=32)
    module = fit(tmp_path, data)
    assert torch.equal(module.answer, data.class_counts())
    assert module.facts.entropy == data.entropy
    with pytest.raises(UserError, match="the data have 5 classes and the model 4"):
        module.facts.class_counts(4)
    rows = torch.cat([y for y, _ in module.facts.training_batches(50)])
    stream = torch.from_numpy(data.training_stream().read(0, 50))
    assert torch.equal(rows, stream.long())


def test_of_which_parts_may_be_told(tmp_path):
    class Told(Ordinary):
        stateful = True

        def class_counts(self, split="train"):
            return torch.arange(K)

    module = fit(tmp_path, Told())
    assert torch.equal(module.answer, torch.arange(K))
    assert module.facts.stateful


@pytest.mark.parametrize("rows", [1, 25, 70, 1000])
def test_first_rows(rows, tmp_path):
    ask = lambda facts: list(facts.training_batches(rows))  # noqa: E731
    module = fit(tmp_path, DataLoader(TensorDataset(X, -X), batch_size=10), ask)
    y, context = (torch.cat(parts) for parts in zip(*module.answer, strict=True))
    assert torch.equal(y, X[:rows])
    assert torch.equal(context, -X[:rows])


def test_first_batch(tmp_path):
    ask = DataFacts.first_batch
    y, context = fit(tmp_path, DataLoader(TensorDataset(X, -X), batch_size=10), ask).answer
    assert torch.equal(context, -y)
    y, context = fit(tmp_path, DataLoader(TensorDataset(X), batch_size=10), ask).answer
    assert torch.equal(y, X[:10])
    assert context is None
    y, context = fit(tmp_path, AdditionDataModule(3, 5, 8, eval_examples=9), ask).answer
    assert (y.shape, context.shape) == ((8, 3), (8, 2, 3))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X + 1, "hold the class 5, and the model has the classes 0 to 4: set its num_classes"),
        (X - 1, "hold the class -1, and the model has the classes 0 to 4"),
        (X.float(), r"a batch holds torch.float32 values, and classes are integers"),
        (X[:, 0], r"a batch of classes has the shape \(10,\): give \(B, D\)"),
        (X.unsqueeze(1), r"a batch of classes has the shape \(10, 1, 3\)"),
    ],
)
def test_other_values_are_refused_before_training(x, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, DataLoader(TensorDataset(x), batch_size=10))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"y": X, "context": X}, "a batch is a dict with the keys y, context: give a tensor of cl"),
        ((X, X, X), "a batch is a tuple of Tensor, Tensor, Tensor"),
        ([X, "a"], "a batch is a list of Tensor, str"),
        ("text", "a batch is of type str"),
        ((), "a batch is a tuple of "),
    ],
)
def test_other_batches_are_refused(batch, message):
    with pytest.raises(UserError, match=message):
        unpack(batch)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: (x,)])
def test_integers_of_any_kind_are_classes(dtype, wrap):
    y, context = unpack(wrap((X % 2).to(dtype)))
    assert y.dtype == torch.int64
    assert torch.equal(y, X % 2)
    assert context is None


def test_a_batch_of_int64_is_not_copied():
    assert unpack((X, X))[0] is X
