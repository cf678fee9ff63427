import math
from itertools import islice, product

import pytest
import torch

from datamodules.full_rank import FullRankDataModule
from dflows.errors import UserError


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


def test_draws_depend_on_the_seed_alone():
    first, again, other = (FullRankDataModule(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.probabilities, again.probabilities)
    assert not torch.equal(first.probabilities, other.probabilities)
    # These must never change, or a resumed run would not go on with its stream.
    assert first.training_stream().read(0, 2).tolist() == [[2, 1, 4, 4, 1], [1, 3, 0, 0, 3]]
    assert first.evaluation_chunks("valid")[0][:5].tolist() == [2, 0, 4, 4, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1: give at least 2"),
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
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        FullRankDataModule(**options)
