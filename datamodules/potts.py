"""The Potts model: states of sites on a lattice that neighbours share, or avoid."""

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from datamodules.enumerable import EnumerableDataModule
from datamodules.lattice import PottsLattice
from datamodules.rows import MOST_ROWS, RowByRow
from datamodules.windows import TrainingStream
from dflows.errors import UserError
from dflows.exact import MOST_STATES

__all__ = ["PottsDataModule"]


class PottsDataModule(EnumerableDataModule):
    r"""Creates exact samples from the Potts model on a square lattice, without an external field.

    .. math:: p(y) = \frac{1}{Z} \exp\Big(J \sum_{\langle ij \rangle} [y_i = y_j]\Big)

    The sum runs over the pairs of neighbours, each counted once, and a pair that is equal weighs
    :math:`e^J`: a positive coupling makes neighbours alike. Inverse temperature is part of J. In a
    periodic lattice the last row and column have the first for their neighbours, so that every site
    has four and there are 2D pairs; at side 2 the two ways around are the same pair, which counts
    twice. A free lattice has :math:`2(D - \sqrt D)` pairs. Dimensions are the sites row by row, so
    that :class:`~dflows.orderings.Strided` draws a lattice column by column.

    Entropy and partition function are computed by a transfer matrix. Samples are found in the table
    of all states, of up to fifty million, else drawn row by row from powers of the transfer matrix,
    with up to 2,048 states of a row.

    Args:
        side: The sites of a row and of a column; :math:`D = \text{side}^2`.
        num_classes: The states of a site, K.
        coupling: J.
        boundary: `periodic` or `free`.
        batch_size: The samples of a training batch, in each process.
        eval_batch_size: The samples of an evaluation batch, in each process.
        eval_examples: The samples of the validation split, and of the test split.
        num_workers: The worker processes of each loader.
        seed: Every seed has samples of its own, of the same distribution.

    Raises:
        UserError: If an argument is out of range, or the lattice and its rows have too many states
            for exact samples, or the lattice is too wide for an exact partition function.

    References:
        | Discrete Flows: Invertible Generative Models of Discrete Data (Tran et al., 2019)
        | https://arxiv.org/abs/1905.10347
        | The Potts model (Wu, 1982), https://doi.org/10.1103/RevModPhys.54.235

    Example:
        >>> data = PottsDataModule(side=4, num_classes=3, coupling=0.5)
        >>> round(data.entropy, 3), round(data.factorized_entropy, 3)
        (16.395, 17.578)
        >>> data.decode(next(iter(data.train_dataloader()))[0])
        '... ... ... ... ... ... ... ... ... ... ... ... ... ... ... ...'
    """

    def __init__(
        self,
        side: int = 3,
        num_classes: int = 3,
        coupling: float = 0.1,
        boundary: Literal["periodic", "free"] = "periodic",
        batch_size: int = 256,
        eval_batch_size: int = 1024,
        *,
        eval_examples: int = 10_000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if boundary not in ("periodic", "free"):
            raise UserError(f'boundary is "{boundary}": give one of periodic, free')
        self._lattice = PottsLattice(side, num_classes, coupling, boundary == "periodic")
        self._tabulated = num_classes ** min(side * side, MOST_STATES.bit_length()) <= MOST_STATES
        if not self._tabulated and num_classes**side > MOST_ROWS:
            raise UserError(
                f"side {side} with {num_classes} classes has more than {MOST_STATES:,} states, and "
                f"a row more than {MOST_ROWS:,}, too many for exact samples: lower side or "
                "num_classes"
            )
        super().__init__(
            side * side,
            num_classes,
            batch_size,
            eval_batch_size,
            eval_examples=eval_examples,
            enumerated=False,
            num_workers=num_workers,
            seed=seed,
        )

    def tabulate(self) -> Tensor:
        return self._lattice.tabulate()

    @property
    def neighbours(self) -> Tensor:
        """The pairs of dimensions that are neighbours, a LongTensor of shape (pairs, 2)."""
        return self._lattice.neighbours

    @property
    def log_partition(self) -> float:
        """The logarithm of the partition function Z, exactly."""
        return self._lattice.log_partition

    @cached_property
    def marginals(self) -> Tensor:
        """The probability of each class in each dimension: 1/K, float64, shape (D, K)."""
        return torch.full((self.length, self.num_classes), 1 / self.num_classes, dtype=torch.double)

    @cached_property
    def entropy(self) -> float:
        """The exact entropy in nats: no model has a smaller expected loss."""
        return self._lattice.entropy

    def samples(self, key: int) -> TrainingStream:
        if self._tabulated:
            return super().samples(key)
        return RowByRow(self._lattice, self.seed, key)
