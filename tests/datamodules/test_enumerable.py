"""What all distributions over enumerable states share, for each of them."""

from itertools import islice

import numpy as np
import pytest
import torch

from datamodules.enumerable import EnumerableDataModule
from datamodules.full_rank import FullRankDataModule
from datamodules.mixture import MixtureDataModule
from datamodules.potts import PottsDataModule
from dflows.errors import UserError
from tests.datamodules.process import Process

# Python 3.12 and later warn where a process with threads forks, as loaders do.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

MODULES = {
    "full rank": (FullRankDataModule, {"length": 3, "num_classes": 4}),
    "mixture": (MixtureDataModule, {"num_classes": 7, "deviation": 0.1}),
    "periodic": (PottsDataModule, {"side": 2, "coupling": 0.8}),
    "free": (PottsDataModule, {"side": 2, "coupling": 0.8, "boundary": "free"}),
}


@pytest.fixture(params=MODULES)
def make(request):
    """Makes a datamodule, given further options."""
    kind, common = MODULES[request.param]
    return lambda **options: kind(**common, **options)


class TestDraws:
    def test_follow_the_distribution(self, make):
        data = make(batch_size=10_000, eval_examples=50_000)
        shape = data.probabilities.shape
        for draws in (
            torch.cat(list(islice(data.train_dataloader(), 5))),
            torch.cat(list(data.test_dataloader())),
        ):
            states = np.ravel_multi_index(draws.T.numpy(), shape)
            counts = np.bincount(states, minlength=data.probabilities.numel())
            expected = 50_000 * data.probabilities.numpy().ravel()
            freedom = len(counts) - 1
            statistic = ((counts - expected) ** 2 / expected).sum()
            assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5

    def test_never_repeat(self, make):
        data = make(batch_size=50, eval_examples=50)
        batches = torch.stack(list(islice(data.train_dataloader(), 100)))
        assert len({batch.numpy().tobytes() for batch in batches}) == 100
        first, second = data.evaluation_chunks("valid"), data.evaluation_chunks("test")
        assert not np.array_equal(first[0], second[0])
        assert not np.array_equal(first[0][: batches[0].numel()], batches[0].flatten())

    @pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (3, 2)])
    def test_processes_and_workers_share_one_stream(self, make, ranks, workers):
        alone = torch.cat(list(islice(make(batch_size=12).train_dataloader(), 4)))
        loaders = []
        for rank in range(ranks):
            data = make(batch_size=12 // ranks, num_workers=workers)
            data.trainer = Process(rank, ranks)
            loaders.append(islice(data.train_dataloader(), 4))
        shared = [batch for together in zip(*loaders, strict=True) for batch in together]
        assert torch.equal(torch.cat(shared), alone)

    @pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2), (3, 0)])
    def test_evaluation_reads_everything_once(self, make, ranks, workers):
        whole = make(eval_examples=1000).evaluation_chunks("valid")[0]
        found = []
        for rank in range(ranks):
            data = make(eval_examples=1000, eval_batch_size=64, num_workers=workers)
            data.trainer = Process(rank, ranks)
            found += list(data.val_dataloader())
        assert all(batch.shape[1] == data.length for batch in found)
        rows = torch.cat(found)
        assert sorted(rows.tolist()) == sorted(whole.reshape(-1, data.length).tolist())

    def test_evaluation_is_fixed(self, make):
        first, again, other = (
            torch.cat(list(make(seed=seed, eval_examples=200).val_dataloader()))
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestInterface:
    def test_figures(self, make):
        data = make()
        assert data.probabilities.dtype == torch.float64
        assert data.probabilities.shape == (data.num_classes,) * data.length
        assert float(data.probabilities.sum()) == pytest.approx(1, abs=1e-12)
        assert data.marginals.shape == (data.length, data.num_classes)
        assert 0 < data.entropy < data.factorized_entropy
        assert data.factorized_entropy <= data.length * np.log(data.num_classes) + 1e-12

    def test_class_counts(self, make):
        data = make(eval_examples=500)
        counts = data.class_counts("valid")
        draws = torch.cat(list(data.val_dataloader()))
        assert torch.equal(counts, draws.flatten().bincount(minlength=data.num_classes))
        expected = data.class_counts()
        assert expected.shape == (data.num_classes,)
        assert abs(int(expected.sum()) - 1_000_000 * data.length) <= data.num_classes

    def test_vocabulary(self, make, tmp_path):
        data = make()
        assert data.decode(torch.tensor([2, 0, 1])) == "2 0 1"
        assert data.encode("2 0 1").tolist() == [2, 0, 1]
        assert data.save_vocabulary(tmp_path) == tmp_path / "tokenizer.json"

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"eval_examples": 0}, "eval_examples must be at least 1, not 0"),
            ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
            ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, not 0"),
            ({"num_workers": -1}, "num_workers must be at least 0, not -1"),
            ({"seed": -1}, "seed must be at least 0, not -1"),
            ({"seed": 10**19}, f"seed must be at most {2**63 - 1}, not {10**19}"),
        ],
    )
    def test_errors(self, make, option, message):
        with pytest.raises(UserError, match=message):
            make(**option)


def test_a_distribution_of_ones_own_needs_its_table_alone():
    class Coins(EnumerableDataModule):
        def __init__(self, length):
            super().__init__(length, 2, 4, 4, eval_examples=10, num_workers=0, seed=0)

        def tabulate(self):
            table = torch.zeros((2,) * self.length, dtype=torch.double)
            table.view(-1)[[0, -1]] = 0.5
            return table

    data = Coins(3)
    assert data.entropy == pytest.approx(np.log(2))
    assert data.factorized_entropy == pytest.approx(3 * np.log(2))
    assert torch.cat(list(data.test_dataloader())).unique(dim=0).tolist() == [[0] * 3, [1] * 3]
    with pytest.raises(UserError, match="more than 50,000,000 states"):
        Coins(26)
