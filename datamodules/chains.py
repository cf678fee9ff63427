"""Draws from Potts models by Markov chains, each of which can be had without the others."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from datamodules.chunks import Array
from datamodules.counter import Counter
from datamodules.draws import Draws
from datamodules.vocabulary import compact_dtype

__all__ = ["Chains", "Gibbs", "Sampler", "SwendsenWang"]


class Sampler(ABC):
    r"""Creates a Markov chain that leaves a Potts model as it is, on any graph.

    .. math:: p(y) \propto \exp\Big(J \sum_{\langle ij \rangle} [y_i = y_j]\Big)

    Args:
        neighbours: The pairs of sites that are neighbours, shape (pairs, 2); those that are there
            twice count twice.
        sites: The number of sites, D.
        num_classes: The number of classes, K.
        coupling: J.
    """

    def __init__(
        self, neighbours: NDArray[np.int64], sites: int, num_classes: int, coupling: float
    ) -> None:
        self.neighbours = neighbours
        self.sites = sites
        self.num_classes = num_classes
        self.coupling = coupling

    @property
    @abstractmethod
    def width(self) -> int:
        """How many random numbers a sweep takes."""

    @abstractmethod
    def sweep(self, states: Array, uniform: NDArray[np.float64]) -> Array:
        """Advances independent chains by one sweep.

        Args:
            states: Classes, shape (D, chains).
            uniform: Draws from [0, 1), shape (width, chains).

        Returns:
            The new classes, shape (D, chains).
        """

    def classes(self, uniform: NDArray[np.float64]) -> Array:
        """Returns classes that are all equally probable, of any shape."""
        return (uniform * self.num_classes).astype(compact_dtype(self.num_classes))


class Gibbs(Sampler):
    """Creates the sampler that draws one site after the other given its neighbours.

    References:
        | Stochastic Relaxation, Gibbs Distributions, and the Bayesian Restoration of Images
          (Geman and Geman, 1984)
        | https://doi.org/10.1109/TPAMI.1984.4767596
    """

    def __init__(
        self, neighbours: NDArray[np.int64], sites: int, num_classes: int, coupling: float
    ) -> None:
        super().__init__(neighbours, sites, num_classes, coupling)
        first, second = neighbours.T
        self._around = [
            np.concatenate([second[first == site], first[second == site]]) for site in range(sites)
        ]
        self._weights = np.exp(coupling * np.arange(1 + max(map(len, self._around))))

    @property
    def width(self) -> int:
        return self.sites

    def sweep(self, states: Array, uniform: NDArray[np.float64]) -> Array:
        states = states.copy()
        classes = np.arange(self.num_classes, dtype=states.dtype)[:, None, None]
        for site, (around, number) in enumerate(zip(self._around, uniform, strict=True)):
            equal = (states[around] == classes).sum(1, dtype=np.int16)
            cumulative = self._weights[equal].cumsum(0)
            states[site] = (cumulative[:-1] <= number * cumulative[-1]).sum(0)
        return states


class SwendsenWang(Sampler):
    r"""Creates the sampler that draws a class for every cluster of sites, for J from 0 on.

    Neighbours that are equal are joined with probability :math:`1 - e^{-J}`; a cluster is what is
    joined.

    References:
        | Nonuniversal Critical Dynamics in Monte Carlo Simulations (Swendsen and Wang, 1987)
        | https://doi.org/10.1103/PhysRevLett.58.86
    """

    @property
    def width(self) -> int:
        return len(self.neighbours) + self.sites

    def sweep(self, states: Array, uniform: NDArray[np.float64]) -> Array:
        one, other = self.neighbours.T
        for_pairs, for_clusters = np.split(uniform, [len(self.neighbours)])
        joined = (states[one] == states[other]) & (for_pairs < -np.expm1(-self.coupling))
        clusters = np.empty(states.shape, compact_dtype(self.sites))
        clusters[:] = np.arange(self.sites)[:, None]
        for pair, (first, second) in zip(joined, self.neighbours, strict=True):
            low = np.minimum(clusters[first], clusters[second])
            high = np.maximum(clusters[first], clusters[second])
            clusters = np.where(pair & (clusters == high), low, clusters)
        return np.take_along_axis(self.classes(for_clusters), clusters, 0)


class Chains(Draws):
    """Creates draws that are each the end of a chain of their own, from independent uniform sites.

    Args:
        sampler: The sampler.
        sweeps: The sweeps of a chain.
        key: Non-negative integers; each tuple of them is a stream of its own.
    """

    def __init__(self, sampler: Sampler, sweeps: int, *key: int) -> None:
        super().__init__(sampler.sites)
        self._sampler = sampler
        self._sweeps = sweeps
        self._key = key

    def block(self, numbers: NDArray[np.int64]) -> Array:
        states = self._sampler.classes(self._uniform(0, self._sampler.sites, numbers))
        for sweep in range(1, self._sweeps + 1):
            uniform = self._uniform(sweep, self._sampler.width, numbers)
            states = self._sampler.sweep(states, uniform)
        return states.T

    def _uniform(self, sweep: int, width: int, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns the random numbers of a sweep, shape (width, chains); sweep 0 is the start."""
        places = numbers * width + np.arange(width)[:, None]
        return Counter(*self._key, sweep).uniform(places)
