"""Exact samples from Potts models on lattices too large for a table, one row after the other."""

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.chunks import Array
from datamodules.counter_rng import CounterRNG
from datamodules.lattice import PottsLattice
from datamodules.samples import Samples
from datamodules.vocabulary import compact_dtype
from dflows.categorical import cdf, inverse_cdf, search_cdf

__all__ = ["MOST_ROWS", "RowByRow"]

MOST_ROWS = 2048
"""States of a row up to which transfer matrices are held, 32 MB each."""


class RowByRow(Samples):
    r"""Creates independent samples of a lattice, each row from its distribution given those above.

    A lattice is a chain of rows, closed where it is periodic, so that powers of the transfer matrix
    hold what the rows to come weigh: with the rows :math:`r_1, \dots, r_n` and transfer matrix T,

    .. math:: p(r_{k+1} \mid r_1, r_k) \propto T_{r_k, r_{k+1}} (T^{n-k-1} B)_{r_{k+1}, r_1}

    with B the step back to the first row, or ones. A row takes one random number.

    Args:
        lattice: The lattice, of at most `MOST_ROWS` states of a row.
        key: Non-negative integers; each tuple of them is a stream of its own.
    """

    def __init__(self, lattice: PottsLattice, *key: int) -> None:
        super().__init__(lattice.side**2)
        self._side, self._num_classes = lattice.side, lattice.num_classes
        self._counter = CounterRNG(*key)
        within, between = (energy.numpy() * lattice.coupling for energy in lattice.row_energies())
        # Scaled, which changes no probability, so that no power overflows.
        self._step: NDArray[np.float64] = np.exp(between + within - (between + within).max())
        rows = len(within)
        back = np.exp(between - between.max()) if lattice.periodic else np.ones((rows, 1))
        to_come = [back]
        for _ in range(self._side - 1):
            weights = self._step @ to_come[-1]
            to_come.append(weights / weights.max())
        first = to_come[-1].diagonal() if lattice.periodic else to_come[-1][:, 0]
        self._first = cdf(torch.from_numpy(np.exp(within - within.max()) * first))
        self._to_come = to_come[-2::-1]

    def block(self, numbers: NDArray[np.int64]) -> Array:
        places = numbers * self._side + np.arange(self._side)[:, None]
        uniform = torch.from_numpy(self._counter.uniform(places))
        drawn = [search_cdf(self._first, uniform[0]).numpy()]
        closing = drawn[0] if self._to_come[0].shape[1] > 1 else np.zeros_like(drawn[0])
        for number, to_come in zip(uniform[1:], self._to_come, strict=True):
            weights = torch.from_numpy(self._step[drawn[-1]] * to_come.T[closing])
            drawn.append(inverse_cdf(number, probs=weights).numpy())
        digits = self._num_classes ** np.arange(self._side - 1, -1, -1)
        sites = np.stack(drawn, axis=1)[:, :, None] // digits % self._num_classes
        return sites.reshape(len(numbers), -1).astype(compact_dtype(self._num_classes))
