import math
from itertools import product

import numpy as np
import pytest
import torch

from datamodules.lattice import PottsLattice
from dflows.errors import UserError
from dflows.exact import entropy

COUPLINGS = [0.0, 0.5, -0.7, 3.0]


def equal_pairs(state, side, periodic):
    """The number of neighbours that are equal, by the coordinates of sites."""
    lines = [state[row * side : (row + 1) * side] for row in range(side)]
    lines += [state[column::side] for column in range(side)]
    ends = zip(lines, lines, strict=True) if periodic else ()
    inner = sum(line[k] == line[k + 1] for line in lines for k in range(side - 1))
    return inner + sum(line[-1] == other[0] for line, other in ends)


def transfer_matrices(side, num_classes, coupling, periodic):
    """The weights of a row, and of each pair of rows."""
    rows = np.array(list(product(range(num_classes), repeat=side)))
    shifted = np.roll(rows, -1, axis=1)
    kept = side if periodic else side - 1
    within = np.exp(coupling * (rows == shifted)[:, :kept].sum(1))
    return within, np.exp(coupling * (rows[:, None] == rows).sum(2))


class TestExact:
    @pytest.mark.parametrize("periodic", [True, False])
    @pytest.mark.parametrize(("side", "num_classes"), [(2, 2), (2, 5), (3, 2), (3, 3)])
    @pytest.mark.parametrize("coupling", COUPLINGS)
    def test_enumeration(self, side, num_classes, coupling, periodic):
        lattice = PottsLattice(side, num_classes, coupling, periodic)
        table = lattice.tabulate()
        assert table.shape == (num_classes,) * side**2
        states = product(range(num_classes), repeat=side**2)
        equal = np.array([equal_pairs(state, side, periodic) for state in states])
        weights = np.exp(coupling * equal)
        expected = torch.from_numpy(weights / weights.sum()).reshape(table.shape)
        assert torch.allclose(table, expected, rtol=1e-12, atol=0)
        assert lattice.log_partition == pytest.approx(math.log(weights.sum()), abs=1e-12)
        assert lattice.mean_equal_pairs == pytest.approx(weights @ equal / weights.sum(), rel=1e-12)
        assert lattice.entropy == pytest.approx(entropy(table), abs=1e-12)

    @pytest.mark.parametrize(("side", "num_classes"), [(4, 4), (6, 2)])
    @pytest.mark.parametrize("coupling", COUPLINGS)
    def test_beyond_enumeration(self, side, num_classes, coupling):
        within, between = transfer_matrices(side, num_classes, coupling, periodic=True)
        step = within[:, None] * between
        expected = math.log(np.trace(np.linalg.matrix_power(step, side)))
        lattice = PottsLattice(side, num_classes, coupling, periodic=True)
        assert lattice.log_partition == pytest.approx(expected, rel=1e-12)
        within, between = transfer_matrices(side, num_classes, coupling, periodic=False)
        weights = within
        for _ in range(side - 1):
            weights = weights @ between * within
        lattice = PottsLattice(side, num_classes, coupling, periodic=False)
        assert lattice.log_partition == pytest.approx(math.log(weights.sum()), rel=1e-12)

    @pytest.mark.parametrize("periodic", [True, False])
    def test_mean_is_the_slope_of_the_partition_function(self, periodic):
        low, middle, high = (PottsLattice(5, 3, 0.9 + d, periodic) for d in (-1e-4, 0, 1e-4))
        slope = (high.log_partition - low.log_partition) / 2e-4
        assert middle.mean_equal_pairs == pytest.approx(slope, abs=1e-5)

    @pytest.mark.parametrize("num_classes", [2, 4])
    def test_frozen(self, num_classes):
        lattice = PottsLattice(5, num_classes, 20.0, periodic=True)
        assert lattice.entropy == pytest.approx(math.log(num_classes), abs=1e-12)
        assert lattice.log_partition == pytest.approx(20 * 50 + math.log(num_classes))
        avoiding = PottsLattice(4, 2, -20.0, periodic=True)  # the two checkerboards
        assert avoiding.entropy == pytest.approx(math.log(2), abs=1e-12)


class TestNeighbours:
    @pytest.mark.parametrize("side", [2, 3, 5])
    @pytest.mark.parametrize("periodic", [True, False])
    def test_every_pair_of_sites_side_by_side(self, side, periodic):
        found = sorted(map(tuple, PottsLattice(side, 2, 0.0, periodic).neighbours.sort().values))
        sites = np.arange(side * side).reshape(side, side)
        expected = []
        for grid in (sites, sites.T):
            for line in grid.tolist():
                expected += [(line[k], line[k + 1]) for k in range(side - 1)]
                expected += [(line[0], line[-1])] * periodic
        assert found == sorted(expected)

    def test_periodic_sites_have_four(self):
        lattice = PottsLattice(4, 2, 0.0, periodic=True)
        assert lattice.neighbours.flatten().bincount().tolist() == [4] * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 1}, "side must be at least 2, not 1"),
        ({"num_classes": 1}, "num_classes must be at least 2, not 1"),
        ({"coupling": 21.0}, "coupling must be between -20 and 20, not 21"),
        ({"coupling": math.nan}, "coupling must be between -20 and 20, not nan"),
        ({"side": 400}, "side 400 with 3 classes is too wide"),
        ({"side": 8}, "side 8 with 3 classes is too wide for an exact partition function"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        PottsLattice(**{"side": 3, "num_classes": 3, "coupling": 0.5, "periodic": True, **options})


def test_a_free_lattice_may_be_wider():
    assert PottsLattice(8, 3, 0.0, periodic=False).log_partition == pytest.approx(64 * math.log(3))
