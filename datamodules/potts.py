"""The Potts model: states of sites on a lattice that neighbours share, or avoid."""

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from datamodules.chains import Chains, Gibbs, SwendsenWang
from datamodules.enumerable import EnumerableDataModule
from datamodules.lattice import PottsLattice
from datamodules.rows import MOST_ROWS, RowByRow
from datamodules.windows import TrainingStream
from dflows.errors import UserError
from dflows.exact import MOST_STATES

__all__ = ["PottsDataModule"]

SAMPLERS = {"gibbs": Gibbs, "swendsen_wang": SwendsenWang}


class PottsDataModule(EnumerableDataModule):
    r"""Creates draws from the Potts model on a square lattice, without an external field.

    .. math:: p(y) = \frac{1}{Z} \exp\Big(J \sum_{\langle ij \rangle} [y_i = y_j]\Big)

    The sum runs over the pairs of neighbours, each counted once, and a pair that is equal weighs
    :math:`e^J`: a positive coupling makes neighbours alike. Inverse temperature is part of J. In a
    periodic lattice the last row and column have the first for their neighbours, so that every site
    has four and there are 2D pairs; at side 2 the two ways around are the same pair, which counts
    twice. A free lattice has :math:`2(D - \sqrt D)` pairs. Dimensions are the sites row by row, so
    that :class:`~dflows.orderings.Strided` draws a lattice column by column.

    Entropy and partition function are computed by a transfer matrix, and the table of all states
    only where it is asked for, up to fifty million of them.

    Args:
        side: The sites of a row and of a column; :math:`D = \text{side}^2`.
        num_classes: The states of a site, K.
        coupling: J.
        boundary: `periodic` or `free`.
        sampler: `exact` draws from the table, or, where there are too many states for one, row by
            row with the help of transfer matrices, of up to 2,048 states of a row. `gibbs` and
            `swendsen_wang` draw by Markov chains, on lattices of any size; every draw is the end of
            a chain of its own, hence independent of the others, and exact in the limit of many
            sweeps. `gibbs` draws site by site, for a coupling of either sign; `swendsen_wang` draws
            clusters, for one from 0 on, and needs fewer sweeps on large lattices that are ordered.
        sweeps: The sweeps of such a chain, which starts at independent uniform sites. Those of
            `gibbs` by default leave a total variation below 1e-12 at side 3, K = 3 and a coupling
            of at most 0.5. Near the transition, :math:`J = \ln(1 + \sqrt K)`, take more.
        batch_size: The draws of a training batch, in each process.
        eval_batch_size: The draws of an evaluation batch, in each process.
        eval_examples: The draws of the validation split, and of the test split.
        num_workers: The worker processes of each loader.
        seed: Every seed has draws of its own, of the same distribution.

    Raises:
        UserError: An argument is out of range; there are too many states, of the lattice and of a
            row, and the sampler is `exact`; the lattice is too wide for its partition function to
            be computed.

    References:
        | Discrete Flows: Invertible Generative Models of Discrete Data (Tran et al., 2019)
        | https://arxiv.org/abs/1905.10347
        | The Potts model (Wu, 1982), https://doi.org/10.1103/RevModPhys.54.235

    Example:
        >>> data = PottsDataModule(side=4, num_classes=3, coupling=0.5, sampler="swendsen_wang")
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
        sampler: Literal["exact", "gibbs", "swendsen_wang"] = "exact",
        sweeps: int = 32,
        batch_size: int = 256,
        eval_batch_size: int = 1024,
        *,
        eval_examples: int = 10_000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        for name, value, allowed in (
            ("boundary", boundary, ("periodic", "free")),
            ("sampler", sampler, ("exact", *SAMPLERS)),
        ):
            if value not in allowed:
                raise UserError(f'{name} is "{value}": give one of {", ".join(allowed)}')
        if sampler == "swendsen_wang" and coupling < 0:
            raise UserError(
                f"swendsen_wang needs a coupling of at least 0, not {coupling:g}: set sampler to "
                "gibbs or exact"
            )
        if sweeps < 1:
            raise UserError(f"sweeps must be at least 1, not {sweeps}")
        self._lattice = PottsLattice(side, num_classes, coupling, boundary == "periodic")
        tabulated = num_classes ** (side * side) <= MOST_STATES
        if sampler == "exact" and not tabulated and num_classes**side > MOST_ROWS:
            raise UserError(
                f"side {side} with {num_classes} classes has more than {MOST_STATES:,} states, and "
                f"a row more than {MOST_ROWS:,}, too many for exact draws: set sampler to gibbs or "
                "swendsen_wang"
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
        self._sampler = sampler
        self._tabulated = tabulated
        self._sweeps = sweeps

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

    def draws(self, key: int) -> TrainingStream:
        if self._sampler == "exact":
            if self._tabulated:
                return super().draws(key)
            return RowByRow(self._lattice, self.seed, key)
        sampler = SAMPLERS[self._sampler](
            self.neighbours.numpy(), self.length, self.num_classes, self._lattice.coupling
        )
        return Chains(sampler, self._sweeps, self.seed, key)
