"""The Potts model on a square lattice: its pairs, its table and its partition function, exactly."""

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dflows.errors import UserError

__all__ = ["PottsLattice"]

MOST_WEIGHTS = 2_000_000
STRONGEST = 20.0
STEP = 1e-20


@dataclass(frozen=True)
class PottsLattice:
    r"""Creates the Potts model of a square lattice, sites in row-major order.

    .. math:: p(y) = \frac{1}{Z} e^{J E(y)}, \qquad E(y) = \sum_{\langle ij \rangle} [y_i = y_j]

    Args:
        side: The sites of a row and of a column, at least 2.
        num_classes: The states of a site, K, at least 2.
        coupling: J.
        periodic: Whether the last row and column have the first for their neighbours. A pair that
            is so joined twice, where the side is 2, counts twice.

    Raises:
        UserError: If an argument is out of range, or the lattice is too wide for its partition
            function to be computed.

    Example:
        >>> lattice = PottsLattice(side=2, num_classes=3, coupling=0.5, periodic=False)
        >>> lattice.neighbours.tolist()
        [[0, 1], [0, 2], [1, 3], [2, 3]]
        >>> round(lattice.log_partition, 4)
        5.1795
    """

    side: int
    num_classes: int
    coupling: float
    periodic: bool

    def __post_init__(self) -> None:
        for name, value in (("side", self.side), ("num_classes", self.num_classes)):
            if value < 2:
                raise UserError(f"{name} must be at least 2, not {value}")
        if not abs(self.coupling) <= STRONGEST:
            raise UserError(
                f"coupling must be between {-STRONGEST:g} and {STRONGEST:g}, not {self.coupling:g}"
            )
        rows = self.num_classes ** min(self.side, MOST_WEIGHTS.bit_length())
        if rows > MOST_WEIGHTS or (self.periodic and len(self._first_rows) * rows > MOST_WEIGHTS):
            raise UserError(
                f"a lattice of side {self.side} with {self.num_classes} classes is too wide for an "
                "exact partition function: lower side or num_classes, or set boundary to free"
            )

    @cached_property
    def neighbours(self) -> Tensor:
        """The pairs of sites that are neighbours, a LongTensor of shape (pairs, 2)."""
        side = self.side
        sites = range(side * side)
        down = [(site, (site + side) % (side * side)) for site in sites]
        right = [(site, site - site % side + (site + 1) % side) for site in sites]
        pairs = [pair for both in zip(right, down, strict=True) for pair in both]
        return torch.tensor([pair for pair in pairs if self.periodic or pair[0] < pair[1]])

    @property
    def log_partition(self) -> float:
        """The logarithm of Z, by a transfer matrix: exact for lattices beyond enumeration."""
        return self._moments[0]

    @property
    def mean_equal_pairs(self) -> float:
        """The expectation of E, the number of neighbours that are equal."""
        return self._moments[1]

    @property
    def entropy(self) -> float:
        """The exact entropy of the lattice in nats."""
        return self.log_partition - self.coupling * self.mean_equal_pairs

    def row_energies(self) -> tuple[Tensor, Tensor]:
        """Returns how many pairs are equal in rows, and in rows that are one below the other.

        Returns:
            Numbers of equal pairs, float64, shapes (R,) and (R, R) with R = K ** side; a row is
            numbered by its digits, the last site running first.
        """
        side, classes = self.side, self.num_classes
        equal = torch.eye(classes, dtype=torch.double)
        within = torch.zeros((classes,) * side, dtype=torch.double)
        for column in range(side - 1):
            within += _spread(equal, (column, column + 1), side)
        if self.periodic:
            within += _spread(equal, (0, side - 1), side)
        between = torch.zeros((classes,) * (2 * side), dtype=torch.double)
        for column in range(side):
            between += _spread(equal, (column, side + column), 2 * side)
        rows = classes**side
        return within.reshape(rows), between.reshape(rows, rows)

    def tabulate(self) -> Tensor:
        """Returns the probability of every state, float64, shape (K,) * side ** 2."""
        side, classes = self.side, self.num_classes
        rows = classes**side
        within, between = self.row_energies()
        # Rows are summed up in place: a table of all states takes hundreds of megabytes.
        table = torch.zeros((rows,) * side, dtype=torch.double)
        for row in range(side):
            table += _spread(within, (row,), side)
            if self.periodic or row < side - 1:
                table += _spread(between, (row, (row + 1) % side), side)
        table.mul_(self.coupling)
        table.sub_(table.max()).exp_()
        return table.div_(table.sum()).reshape((classes,) * (side * side))

    @cached_property
    def _moments(self) -> tuple[float, float]:
        """The logarithm of Z and its derivative, which is the expectation of E."""
        # An imaginary step this small has the derivative as its image, without any round-off.
        moments = self._log_partition(complex(self.coupling, STEP))
        return moments.real, moments.imag / STEP

    def _log_partition(self, coupling: complex) -> complex:
        """Sums site by site over the states of the row above.

        Of the rows that the first one can be, those that differ in the names of the classes alone
        are summed up as one.
        """
        side, classes = self.side, self.num_classes
        largest = max(0.0, self.coupling)
        unequal = math.exp(-largest)
        gained = cmath.exp(coupling - largest) - unequal
        pair = unequal + gained * torch.eye(classes, dtype=torch.double)
        weights = self._first_weights()
        log_scale = largest * len(self.neighbours)
        for row in range(side):
            for column in range(side):
                if row:
                    weights = unequal * weights.sum(column + 1, keepdim=True) + gained * weights
                if column:
                    weights = weights * _spread(pair, (column, column + 1), side + 1)
            if self.periodic:
                weights = weights * _spread(pair, (1, side), side + 1)
            scale = weights.real.max().item()
            log_scale += math.log(scale)
            weights = weights / scale
        if self.periodic:
            first = torch.tensor(self._first_rows)
            for column in range(side):
                weights = weights * _spread(pair[first[:, column]], (0, column + 1), side + 1)
        return log_scale + cmath.log(weights.sum().item())

    def _first_weights(self) -> Tensor:
        """Returns how many first rows each stands for, shape (first rows, K, …, K)."""
        if not self.periodic:
            return torch.ones((1,) + (self.num_classes,) * self.side, dtype=torch.double)
        first = self._first_rows
        weights = torch.zeros((len(first),) + (self.num_classes,) * self.side, dtype=torch.double)
        for number, row in enumerate(first):
            weights[(number, *row)] = math.perm(self.num_classes, max(row) + 1)
        return weights

    @cached_property
    def _first_rows(self) -> list[list[int]]:
        """Every row whose classes are named in the order in which they come, or too many."""
        rows = [[0]]
        for _ in range(self.side - 1):
            if len(rows) > MOST_WEIGHTS // self.num_classes**self.side:
                break
            rows = [
                [*row, index]
                for row in rows
                for index in range(min(max(row) + 2, self.num_classes))
            ]
        return rows


def _spread(values: Tensor, axes: Sequence[int], dimensions: int) -> Tensor:
    """Returns a view that has its dimensions at some axes of so many, and 1 at the others."""
    sizes = dict(zip(axes, values.shape, strict=True))
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return values.permute(order).reshape([sizes.get(axis, 1) for axis in range(dimensions)])
