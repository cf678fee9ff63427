from inspect import signature
from itertools import combinations_with_replacement, product

import numpy as np
import pytest

from datamodules import PottsDataModule
from datamodules.chains import Chains, Gibbs, SwendsenWang
from datamodules.lattice import PottsLattice


def lattice_and_sampler(kind, num_classes, coupling, periodic, side=2):
    lattice = PottsLattice(side, num_classes, coupling, periodic)
    return lattice, kind(lattice.neighbours.numpy(), side**2, num_classes, coupling)


def cuts(sampler):
    """Where in [0, 1) the outcome of a sweep can change, for each of its random numbers."""
    classes = range(sampler.num_classes)
    if isinstance(sampler, SwendsenWang):
        joined, even = 1 - np.exp(-sampler.coupling), [k / len(classes) for k in classes[1:]]
        return [[joined]] * len(sampler.neighbours) + [even] * sampler.sites
    degree = 2 * len(sampler.neighbours) // sampler.sites
    found = set()
    for around in combinations_with_replacement(classes, degree):
        for counts in {
            tuple(np.roll(np.bincount(around, minlength=len(classes)), k)) for k in classes
        }:
            weights = np.exp(sampler.coupling * np.array(counts))
            found |= set((weights.cumsum() / weights.sum()).round(15)[:-1])
    return [sorted(found)] * sampler.sites


def kernel(sampler):
    """The exact transition matrix of a sweep: what it does on every piece of the unit cube."""
    edges = [np.array([0, *inner, 1]) for inner in cuts(sampler)]
    middles = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    uniform = np.array(list(product(*middles))).T
    volumes = np.prod(list(product(*map(np.diff, edges))), axis=1)
    shape = (sampler.num_classes,) * sampler.sites
    matrix = []
    for state in np.ndindex(shape):
        after = sampler.sweep(np.tile(np.array(state)[:, None], uniform.shape[1]), uniform)
        matrix.append(np.bincount(np.ravel_multi_index(after, shape), volumes, np.prod(shape)))
    return np.array(matrix)


KERNELS = [
    (Gibbs, 2, 0.8, True),
    (Gibbs, 2, -0.8, False),
    (Gibbs, 3, 0.5, False),
    (SwendsenWang, 2, 0.8, True),
    (SwendsenWang, 2, 0.8, False),
    (SwendsenWang, 3, 0.5, False),
]


class TestKernel:
    @pytest.mark.parametrize("options", KERNELS)
    def test_leaves_the_distribution_as_it_is(self, options):
        lattice, sampler = lattice_and_sampler(*options)
        probabilities, matrix = lattice.tabulate().flatten().numpy(), kernel(sampler)
        assert np.allclose(matrix.sum(1), 1, atol=1e-12)
        assert (matrix > 0).all()  # hence it has no other stationary distribution
        assert np.allclose(probabilities @ matrix, probabilities, atol=1e-12)

    @pytest.mark.parametrize("options", [options for options in KERNELS if options[0] != Gibbs])
    def test_clusters_balance_in_detail(self, options):
        lattice, sampler = lattice_and_sampler(*options)
        flow = lattice.tabulate().flatten().numpy()[:, None] * kernel(sampler)
        assert np.allclose(flow, flow.T, atol=1e-12)

    @pytest.mark.parametrize("options", KERNELS)
    @pytest.mark.parametrize("sweeps", [1, 2])
    def test_chains_follow_it_from_uniform_sites(self, options, sweeps):
        _, sampler = lattice_and_sampler(*options)
        states = sampler.num_classes**sampler.sites
        exact = np.full(states, 1 / states) @ np.linalg.matrix_power(kernel(sampler), sweeps)
        draws = Chains(sampler, sweeps, 0, 0).open()(0, 40_000)
        counts = np.bincount(
            np.ravel_multi_index(draws.T, (sampler.num_classes,) * sampler.sites), minlength=states
        )
        expected = 40_000 * exact
        statistic = ((counts - expected) ** 2 / expected).sum()
        freedom = states - 1
        assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("coupling", [0.5, 0.1, -0.5])
def test_the_sweeps_by_default_forget_where_they_began(coupling):
    table = PottsLattice(3, 3, coupling, periodic=True).tabulate().numpy()
    reached = np.full(table.shape, table.size**-1.0)
    for _ in range(signature(PottsDataModule).parameters["sweeps"].default):
        for site in range(9):
            reached = reached.sum(site, keepdims=True) * table / table.sum(site, keepdims=True)
    assert np.abs(reached - table).sum() / 2 < 1e-12


class TestStationary:
    @pytest.mark.parametrize(
        ("kind", "coupling"), [(Gibbs, 0.5), (Gibbs, -1.0), (Gibbs, 1.0), (SwendsenWang, 0.5)]
    )
    @pytest.mark.parametrize(("side", "num_classes"), [(3, 3), (4, 5)])
    def test_equal_pairs_have_their_exact_mean(self, kind, coupling, side, num_classes):
        lattice, sampler = lattice_and_sampler(kind, num_classes, coupling, True, side)
        draws = Chains(sampler, 32, 1, 0).open()(0, 8000)
        first, second = draws[:, lattice.neighbours.numpy()].transpose(2, 0, 1)
        equal = (first == second).sum(1)
        error = equal.std() / len(equal) ** 0.5
        assert abs(equal.mean() - lattice.mean_equal_pairs) < 4 * error
        assert error < 0.1

    @pytest.mark.parametrize("kind", [Gibbs, SwendsenWang])
    def test_draws_follow_the_table(self, kind):
        lattice, sampler = lattice_and_sampler(kind, 2, 0.3, True, 3)
        draws = Chains(sampler, 32, 2, 0).open()(0, 50_000)
        counts = np.bincount(np.ravel_multi_index(draws.T, (2,) * 9), minlength=512)
        expected = 50_000 * lattice.tabulate().flatten().numpy()
        assert abs(((counts - expected) ** 2 / expected).sum() - 511) < 4 * (2 * 511) ** 0.5


class TestClusters:
    @pytest.mark.parametrize("periodic", [True, False])
    def test_are_what_is_joined(self, periodic):
        side, chains = 5, 300
        lattice, _ = lattice_and_sampler(SwendsenWang, 2, 1.0, periodic, side)
        pairs = lattice.neighbours.numpy()
        sampler = SwendsenWang(pairs, side**2, side**2, 1.0)
        generator = np.random.default_rng(0)
        states = generator.integers(0, 2, (side**2, chains))
        uniform = generator.random((sampler.width, chains))
        # A class of its own for every site that may give its cluster a class.
        uniform[len(pairs) :] = (np.arange(side**2)[:, None] + 0.5) / side**2
        after = sampler.sweep(states, uniform)
        joined = (states[pairs[:, 0]] == states[pairs[:, 1]]) & (
            uniform[: len(pairs)] < 1 - np.exp(-1.0)
        )
        for chain in range(chains):
            near = np.eye(side**2, dtype=bool)
            for first, second in pairs[joined[:, chain]]:
                near[first, second] = near[second, first] = True
            reached = np.linalg.matrix_power(near.astype(float), side**2) > 0
            same = after[:, chain, None] == after[:, chain]
            assert np.array_equal(same, reached)

    def test_without_coupling_every_site_is_one(self):
        _, sampler = lattice_and_sampler(SwendsenWang, 4, 0.0, True, 3)
        uniform = np.random.default_rng(0).random((sampler.width, 50))
        after = sampler.sweep(np.zeros((9, 50), np.int64), uniform)
        assert np.array_equal(after, (uniform[-9:] * 4).astype(int))


class TestChains:
    @pytest.mark.parametrize("kind", [Gibbs, SwendsenWang])
    def test_draws_depend_on_their_number_alone(self, kind, monkeypatch):
        _, sampler = lattice_and_sampler(kind, 3, 0.5, True, 3)
        read = Chains(sampler, 3, 0, 0).open()
        rows = read(0, 100)
        assert rows.shape == (100, 9)
        for first, number in ((0, 1), (7, 20), (93, 7)):
            assert np.array_equal(read(first, number), rows[first : first + number])
        monkeypatch.setattr("datamodules.draws.BLOCK_SIZE", 33)
        assert np.array_equal(read(0, 100), rows)

    @pytest.mark.parametrize("other", [(3, 0, 1), (3, 1, 0), (4, 0, 0)])
    def test_keys_and_sweeps_are_apart(self, other):
        _, sampler = lattice_and_sampler(Gibbs, 3, 0.5, True, 3)
        one, another = (Chains(sampler, *key).open()(0, 50) for key in ((3, 0, 0), other))
        assert not np.array_equal(one, another)

    def test_a_sweep_leaves_its_argument(self):
        for kind in (Gibbs, SwendsenWang):
            _, sampler = lattice_and_sampler(kind, 3, 0.5, True, 3)
            states = np.zeros((9, 4), np.uint8)
            sampler.sweep(states, np.full((sampler.width, 4), 0.9))
            assert not states.any()

    def test_many_classes(self):
        _, sampler = lattice_and_sampler(Gibbs, 1000, 0.5, True, 2)
        draws = Chains(sampler, 2, 0, 0).open()(0, 100)
        assert draws.max() > 900
