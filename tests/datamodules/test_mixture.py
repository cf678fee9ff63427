import math

import numpy as np
import pytest
import torch

from datamodules.mixture import MixtureDataModule
from dflows.errors import UserError


def by_hand(data, deviation):
    """The table, one bin after the other."""
    classes = range(data.num_classes)
    table = np.array(
        [
            [
                sum(
                    math.exp(-((i + 0.5 - a) ** 2 + (j + 0.5 - b) ** 2) / (2 * deviation**2))
                    for a, b in data.centres.tolist()
                )
                for j in classes
            ]
            for i in classes
        ]
    )
    return torch.from_numpy(table / table.sum())


def test_entropies_as_measured():
    data = MixtureDataModule()
    assert data.entropy == pytest.approx(7.233, abs=1e-3)
    assert data.factorized_entropy - data.entropy == pytest.approx(0.732, abs=1e-3)


@pytest.mark.parametrize(
    ("arrangement", "modes"), [("circle", 1), ("circle", 5), ("grid", 4), ("grid", 8), ("grid", 9)]
)
@pytest.mark.parametrize(("num_classes", "deviation"), [(2, 0.2), (13, 0.1)])
def test_table_by_hand(arrangement, modes, num_classes, deviation):
    data = MixtureDataModule(num_classes, arrangement, modes, radius=0.3, deviation=deviation)
    assert data.centres.shape == (modes, 2)
    assert torch.allclose(data.probabilities, by_hand(data, deviation * num_classes), atol=1e-14)


def test_circle():
    data = MixtureDataModule(10, modes=4, radius=0.3)
    expected = torch.tensor([[8, 5], [5, 8], [2, 5], [5, 2]]).double()
    assert torch.allclose(data.centres, expected)


@pytest.mark.parametrize("modes", [4, 8, 9, 16, 24, 25])
def test_grid_is_symmetric(modes):
    data = MixtureDataModule(31, "grid", modes, deviation=0.02)
    table = data.probabilities
    for other in (table.flip(0), table.flip(1), table.T):
        assert torch.allclose(table, other, atol=1e-15)
    assert data.centres.unique()[[0, -1]].tolist() == pytest.approx([31 * 0.18, 31 * 0.82])
    middle = table[15, 15] > table.max() / 2
    assert middle == (modes % 2 == 1)


def test_modes_narrower_than_a_bin_keep_their_mass():
    table = MixtureDataModule(10, modes=4, radius=0.33, deviation=1e-3).probabilities
    assert table.sum() == pytest.approx(1)
    assert (table > 0.1).sum() == 8  # a mode's middle is between two bins


def test_draws_follow_the_distribution():
    data = MixtureDataModule(7, deviation=0.1, eval_examples=50_000)
    (draws,) = data.evaluation_chunks("valid")
    counts = np.bincount(draws.reshape(-1, 2) @ [7, 1], minlength=49)
    expected = 50_000 * data.probabilities.numpy().ravel()
    assert ((counts - expected) ** 2 / expected).sum() < 94  # chi-square, 48 degrees


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1: give at least 2"),
        ({"num_classes": 10_000}, "more than 50,000,000 states"),
        ({"arrangement": "line"}, 'arrangement is "line": give "circle" or "grid"'),
        ({"modes": 0}, "modes is 0: give at least 1"),
        ({"modes": 10**9}, "modes is 1,000,000,000: give at most 10,000"),
        ({"num_classes": 10**9}, "more than 50,000,000 states"),
        ({"eval_examples": 10**12}, "a split of 1,000,000,000,000 examples .* takes at least"),
        ({"radius": -0.1}, "radius must be finite and not negative, not -0.1"),
        ({"radius": math.nan}, "radius must be finite"),
        ({"deviation": 0.0}, "deviation must be finite and positive, not 0.0"),
        ({"deviation": math.inf}, "deviation must be finite and positive, not inf"),
        *(
            ({"arrangement": "grid", "modes": modes}, f"a grid cannot have {modes} modes")
            for modes in (1, 2, 3, 5, 7, 15)
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        MixtureDataModule(**options)
