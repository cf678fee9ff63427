"""Draws of a lattice row by row: exact, and each to be had without the others."""

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
    drawn = RowByRow(lattice, 3).open()(0, DRAWS)
    assert drawn.shape == (DRAWS, side * side)
    powers = num_classes ** np.arange(side * side - 1, -1, -1)
    counts = np.bincount(drawn.astype(int) @ powers, minlength=len(table))
    # Pearson's statistic, whose mean is the degrees of freedom and whose variance twice that.
    freedom = len(table) - 1
    statistic = ((counts - DRAWS * table) ** 2 / (DRAWS * table)).sum()
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def test_beyond_a_table_the_equal_pairs_are_as_many_as_expected():
    lattice = PottsLattice(4, 5, 0.5, periodic=True)
    drawn = torch.from_numpy(RowByRow(lattice, 1).open()(0, 100_000).astype(np.int64))
    one, other = lattice.neighbours.T
    equal = (drawn[:, one] == drawn[:, other]).double().sum(dim=1)
    error = equal.std() / len(equal) ** 0.5
    assert abs(equal.mean() - lattice.mean_equal_pairs) < 4 * error


def test_a_draw_depends_on_its_number_alone():
    lattice = PottsLattice(3, 3, 0.5, periodic=True)
    read = RowByRow(lattice, 0, 1).open()
    whole = read(0, 5000)
    assert (read(4090, 20) == whole[4090:4110]).all()
    assert (RowByRow(lattice, 0, 1).open()(0, 50) == whole[:50]).all()
    assert (RowByRow(lattice, 0, 2).open()(0, 50) != whole[:50]).any()
