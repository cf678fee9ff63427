import math
from itertools import islice, product

import numpy as np
import pytest
import torch

from datamodules.full_rank import FullRankDataModule
from dflows.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Process:
    """What a datamodule asks a trainer for its loaders."""

    def __init__(self, rank, ranks):
        self.global_rank = rank
        self.world_size = ranks


class TestDistribution:
    @pytest.mark.parametrize(
        ("length", "num_classes", "entropy", "factorized"),
        [(5, 5, 7.620, 8.044), (5, 10, 11.087, 11.513)],
    )
    def test_entropies_as_measured(self, length, num_classes, entropy, factorized):
        data = FullRankDataModule(length, num_classes)
        assert data.entropy == pytest.approx(entropy, abs=5e-4)
        assert data.factorized_entropy == pytest.approx(factorized, abs=5e-4)

    @pytest.mark.parametrize(("length", "num_classes"), [(1, 2), (2, 3), (3, 4), (4, 2)])
    def test_marginals_by_enumeration(self, length, num_classes):
        data = FullRankDataModule(length, num_classes, seed=4)
        assert data.probabilities.shape == (num_classes,) * length
        assert data.probabilities.sum() == pytest.approx(1, abs=1e-12)
        marginals = torch.zeros(length, num_classes, dtype=torch.float64)
        entropy = 0.0
        for state in product(range(num_classes), repeat=length):
            probability = float(data.probabilities[state])
            entropy -= probability * math.log(probability)
            for dimension, index in enumerate(state):
                marginals[dimension, index] += probability
        assert torch.allclose(data.marginals, marginals, atol=1e-12)
        assert data.entropy == pytest.approx(entropy)
        assert data.entropy <= data.factorized_entropy + 1e-12
        expected = (marginals.sum(0) * 1_000_000).round().long()
        assert (data.class_counts() - expected).abs().max() <= 1

    def test_given(self):
        table = [[1, 0, 3], [0, 0, 0], [2, 2, 0]]
        data = FullRankDataModule(2, 3, probabilities=table)
        assert torch.allclose(data.probabilities, torch.tensor(table).double() / 8)
        flat = FullRankDataModule(2, 3, probabilities=[p for row in table for p in row])
        assert torch.equal(flat.probabilities, data.probabilities)
        draws = torch.cat(list(islice(data.train_dataloader(), 40)))
        found = {tuple(row) for row in draws.tolist()}
        assert found == {(0, 0), (0, 2), (2, 0), (2, 1)}

    def test_zero_entropy(self):
        data = FullRankDataModule(2, 2, probabilities=[0, 1, 0, 0])
        assert data.entropy == 0
        assert next(iter(data.train_dataloader())).unique(dim=0).tolist() == [[0, 1]]


class TestDraws:
    def test_follow_the_distribution(self):
        data = FullRankDataModule(2, 4, batch_size=10_000, eval_examples=50_000)
        for draws in (
            torch.cat(list(islice(data.train_dataloader(), 5))),
            torch.cat(list(data.test_dataloader())),
        ):
            counts = np.bincount(draws @ torch.tensor([4, 1]), minlength=16)
            expected = 50_000 * data.probabilities.numpy().ravel()
            assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square, 15 degrees

    def test_never_repeat(self):
        data = FullRankDataModule(12, 2, batch_size=50)
        batches = torch.stack(list(islice(data.train_dataloader(), 200)))
        assert len({batch.numpy().tobytes() for batch in batches}) == 200
        first, second = data.evaluation_chunks("valid"), data.evaluation_chunks("test")
        assert not np.array_equal(first[0], second[0])
        assert not np.array_equal(first[0][:600], batches[0].flatten())

    @pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (3, 2)])
    def test_processes_and_workers_share_one_stream(self, ranks, workers):
        alone = torch.cat(list(islice(FullRankDataModule(batch_size=12).train_dataloader(), 4)))
        loaders = []
        for rank in range(ranks):
            data = FullRankDataModule(batch_size=12 // ranks, num_workers=workers)
            data.trainer = Process(rank, ranks)
            loader = data.train_dataloader()
            loader._next_row = lambda: 0
            loaders.append(islice(loader, 4))
        shared = [batch for together in zip(*loaders, strict=True) for batch in together]
        assert torch.equal(torch.cat(shared), alone)

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_evaluation_reads_everything_once(self, ranks, workers):
        whole = FullRankDataModule(eval_examples=1000).evaluation_chunks("valid")[0].reshape(-1, 5)
        found = []
        for rank in range(ranks):
            data = FullRankDataModule(eval_examples=1000, eval_batch_size=64, num_workers=workers)
            data.trainer = Process(rank, ranks)
            found += list(data.val_dataloader())
        assert all(batch.shape[1] == 5 for batch in found)
        rows = torch.cat(found)
        assert sorted(rows.tolist()) == sorted(whole.tolist())

    def test_evaluation_is_fixed(self):
        first, again, other = (FullRankDataModule(seed=seed) for seed in (0, 0, 1))
        assert torch.equal(*(torch.cat(list(data.val_dataloader())) for data in (first, again)))
        assert not torch.equal(first.probabilities, other.probabilities)
        assert first.class_counts("valid").sum() == 10_000 * 5


class TestInterface:
    def test_vocabulary(self, tmp_path):
        data = FullRankDataModule(3, 12)
        assert (data.num_classes, data.length) == (12, 3)
        assert data.decode(torch.tensor([11, 0, 3])) == "11 0 3"
        assert data.encode("11 0 3").tolist() == [11, 0, 3]
        assert data.save_vocabulary(tmp_path) == tmp_path / "tokenizer.json"
        assert data.class_counts().shape == (12,)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_classes": 1}, "num_classes must be at least 2, not 1"),
            ({"length": 0}, "length must be at least 1, not 0"),
            ({"length": 400, "num_classes": 10}, "more than 50,000,000 states"),
            ({"eval_examples": 0}, "eval_examples must be at least 1"),
            ({"probabilities": [1.0]}, "1 numbers, but 5 classes in 5 dimensions have 3125"),
            ({"length": 1, "probabilities": [1, -1, 1, 1, 1]}, "finite, not negative"),
            ({"length": 1, "probabilities": [0] * 5}, "not all 0"),
            ({"length": 1, "probabilities": [float("nan")] * 5}, "finite"),
            ({"probabilities": [[1, 2], [3]]}, "as many in every nested list"),
            ({"probabilities": "abc"}, "must be numbers"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(UserError, match=message):
            FullRankDataModule(**options)
