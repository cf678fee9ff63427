"""Samples of a lattice row by row: exact, and each to be had without the others."""

import numpy as np
import pytest
import torch

from datamodules.lattice import PottsLattice
from datamodules.rows import RowByRow

DRAWS = 400_000


@pytest.mark.parametrize(
    ("side", "num_classes", "coupling", "periodic"),
    [
        (2, 3, 0.7, True),
        (2, 3, 0.7, False),
        (3, 2, 1.1, True),
        (3, 2, -0.6, True),
        (3, 2, 0.9, False),
    ],
)
def test_frequencies_are_the_probabilities(side, num_classes, coupling, periodic):
    lattice = PottsLattice(side, num_classes, coupling, periodic)
    table = lattice.tabulate().flatten().numpy()
    drawn = RowByRow(lattice, 3).read(0, DRAWS)
    assert drawn.shape == (DRAWS, side * side)
    powers = num_classes ** np.arange(side * side - 1, -1, -1)
    counts = np.bincount(drawn.astype(int) @ powers, minlength=len(table))
    # Pearson's statistic, whose mean is the degrees of freedom and whose variance twice that.
    freedom = len(table) - 1
    statistic = ((counts - DRAWS * table) ** 2 / (DRAWS * table)).sum()
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("coupling", [0.5, -1.0, 1.0])
@pytest.mark.parametrize(("side", "num_classes"), [(3, 3), (4, 5)])
def test_equal_pairs_have_their_exact_mean(side, num_classes, coupling, periodic):
    lattice = PottsLattice(side, num_classes, coupling, periodic)
    drawn = torch.from_numpy(RowByRow(lattice, 1).read(0, 50_000).astype(np.int64))
    one, other = lattice.neighbours.T
    equal = (drawn[:, one] == drawn[:, other]).double().sum(dim=1)
    error = equal.std() / len(equal) ** 0.5
    assert abs(equal.mean() - lattice.mean_equal_pairs) < 4 * error
    assert error < 0.1


def test_without_coupling_sites_are_uniform_and_independent():
    drawn = RowByRow(PottsLattice(3, 4, 0.0, periodic=True), 0).read(0, 50_000)
    for pair in ((0, 1), (0, 8), (3, 6)):
        counts = np.bincount(drawn[:, pair].astype(int) @ [4, 1], minlength=16)
        assert ((counts - 3125) ** 2 / 3125).sum() < 15 + 4 * 30**0.5


def test_a_sample_depends_on_its_number_and_key_alone(monkeypatch):
    lattice = PottsLattice(3, 3, 0.5, periodic=True)
    read = RowByRow(lattice, 0, 1).read
    whole = read(0, 5000)
    assert (read(4090, 20) == whole[4090:4110]).all()
    assert (RowByRow(lattice, 0, 1).read(0, 50) == whole[:50]).all()
    assert (RowByRow(lattice, 0, 2).read(0, 50) != whole[:50]).any()
    monkeypatch.setattr("datamodules.samples.BLOCK_SIZE", 33)
    assert (read(0, 100) == whole[:100]).all()
