"""The full-rank distribution: every state has a probability of its own."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.enumerable import EnumerableDataModule
from dflows.errors import UserError

__all__ = ["FullRankDataModule"]


class FullRankDataModule(EnumerableDataModule):
    r"""Creates independent samples from a full-rank distribution over all :math:`K^D` states.

    By default its probabilities are one draw from the flat Dirichlet distribution, so that no
    factorization holds. Training samples never repeat: number n is the same whoever computes it,
    and every process and worker computes its own. The evaluation splits are fixed.

    Args:
        length: The number of dimensions, D.
        num_classes: The number of classes, K.
        batch_size: The samples of a training batch, in each process.
        eval_batch_size: The samples of an evaluation batch, in each process.
        eval_examples: The samples of the validation split, and of the test split.
        probabilities: The distribution, in place of a random one: :math:`K^D` numbers in the order
            of the states' digits (the last dimension runs first), or a nested list of them. They
            are divided by their sum.
        num_workers: The worker processes of each loader.
        seed: Every seed has a distribution and samples of its own.

    Raises:
        UserError: If an argument is out of range, or there are more states than can be held.

    References:
        | Discrete Flows: Invertible Generative Models of Discrete Data (Tran et al., 2019)
        | https://arxiv.org/abs/1905.10347

    Example:
        >>> data = FullRankDataModule(length=5, num_classes=5)
        >>> round(data.entropy, 3), round(data.factorized_entropy, 3)
        (7.62, 8.044)
        >>> data.decode(next(iter(data.train_dataloader()))[0])
        '... ... ... ... ...'
    """

    def __init__(
        self,
        length: int = 5,
        num_classes: int = 5,
        batch_size: int = 256,
        eval_batch_size: int = 1024,
        *,
        eval_examples: int = 10_000,
        probabilities: Sequence[float] | Sequence[Sequence[float]] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            length,
            num_classes,
            batch_size,
            eval_batch_size,
            eval_examples=eval_examples,
            num_workers=num_workers,
            seed=seed,
        )
        self._table = None if probabilities is None else self._normalized(probabilities)

    def tabulate(self) -> Tensor:
        table = self._table
        if table is None:
            states = self.num_classes**self.length
            table = np.random.default_rng(self.seed).dirichlet(np.ones(states))
        return torch.from_numpy(table.reshape((self.num_classes,) * self.length))

    def _normalized(
        self, probabilities: Sequence[float] | Sequence[Sequence[float]]
    ) -> NDArray[np.float64]:
        states = self.num_classes**self.length
        try:
            table = np.asarray(probabilities, np.float64).reshape(-1)
        except (TypeError, ValueError):
            raise UserError("probabilities must be numbers, as many in every nested list") from None
        if len(table) != states:
            raise UserError(
                f"probabilities has {len(table)} numbers, but {self.num_classes} classes in "
                f"{self.length} dimensions have {states} states"
            )
        if not np.isfinite(table).all() or table.min() < 0 or not table.sum():
            raise UserError("probabilities must be finite, not negative, and not all 0")
        return table / table.sum()
