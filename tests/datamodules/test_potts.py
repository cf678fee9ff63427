import math

import pytest
import torch

from datamodules.potts import PottsDataModule
from dflows.errors import UserError
from dflows.exact import entropy, marginals

# Exact entropies in nats: side, K, and J = 0.1 and 0.5 on a periodic and on a free lattice.
ENTROPIES = [
    (3, 3, 9.8660, 9.0479, 9.8739, 9.4986),
    (3, 4, 12.4585, 11.7947, 12.4650, 12.1363),
    (3, 5, 14.4695, 13.9193, 14.4749, 14.1876),
    (4, 3, 17.5413, 16.3952, 17.5505, 16.7918),
    (4, 4, 22.1496, 21.1993, 22.1574, 21.4954),
    (4, 5, 25.7243, 24.9159, 25.7310, 25.1535),
]


@pytest.mark.parametrize(("side", "num_classes", "a", "b", "c", "d"), ENTROPIES)
def test_entropies(side, num_classes, a, b, c, d):
    found = [
        PottsDataModule(side, num_classes, coupling, boundary).entropy
        for boundary in ("periodic", "free")
        for coupling in (0.1, 0.5)
    ]
    assert found == pytest.approx([a, b, c, d], abs=5e-5)


@pytest.mark.parametrize("boundary", ["periodic", "free"])
@pytest.mark.parametrize("coupling", [0.5, -0.5])
def test_figures_are_those_of_the_table(boundary, coupling):
    data = PottsDataModule(3, 3, coupling, boundary)
    assert data.probabilities.shape == (3,) * 9
    assert data.entropy == pytest.approx(entropy(data.probabilities), abs=1e-12)
    assert torch.allclose(data.marginals, marginals(data.probabilities), atol=1e-14)
    assert data.factorized_entropy == pytest.approx(9 * math.log(3), abs=1e-12)
    aligned = data.probabilities[(0,) * 9].log() + data.log_partition
    assert float(aligned) == pytest.approx(coupling * len(data.neighbours))


def test_dimensions_are_sites_row_by_row():
    table = PottsDataModule(3, 2, 2.0, "free").probabilities
    rows, columns, corner = (
        table[0, 0, 0, 0, 0, 0, 1, 1, 1],
        table[0, 0, 1, 0, 0, 1, 0, 0, 1],
        table[0, 0, 0, 0, 0, 0, 0, 0, 1],
    )
    assert rows == pytest.approx(columns)
    assert math.log(corner / rows) == pytest.approx(2.0)  # one pair less is unequal


def test_larger_than_a_table():
    data = PottsDataModule(4, 4, 0.5, batch_size=8, eval_examples=20)
    assert next(iter(data.train_dataloader())).shape == (8, 16)
    assert data.class_counts().tolist() == [4_000_000] * 4
    assert data.class_counts("test").sum() == 20 * 16
    with pytest.raises(UserError, match="more than 50,000,000 states"):
        _ = data.probabilities


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, not 1"),
        ({"side": 1}, "side must be at least 2, not 1"),
        ({"side": 4, "num_classes": 7}, "too many for exact samples: lower side or num_classes"),
        ({"side": 9}, "side 9 with 3 classes is too wide"),
        ({"coupling": math.inf}, "coupling must be between"),
        ({"boundary": "open"}, 'boundary is "open": give one of periodic, free'),
        ({"eval_examples": 0}, "eval_examples must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        PottsDataModule(**options)
