"""Synthetic data of which everything is known exactly."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.chunks import Array, Chunks
from datamodules.counter import Counter
from datamodules.module import StreamDataModule
from datamodules.vocabulary import IntegerVocabulary
from datamodules.windows import Reader, TrainingStream
from dflows.errors import UserError

__all__ = ["FullRankDataModule"]

MOST_STATES = 50_000_000
EXPECTED_DRAWS = 1_000_000


class FullRankDataModule(StreamDataModule):
    r"""Creates independent draws from a full-rank distribution over all :math:`K^D` states.

    By default its probabilities are one draw from the flat Dirichlet distribution, so that no
    factorization holds. Training draws never repeat: draw number n is the same whoever computes it,
    and every process and worker computes its own. The evaluation splits are fixed.

    Args:
        length: The number of dimensions, D.
        num_classes: The number of classes, K.
        batch_size: The draws of a training batch, in each process.
        eval_batch_size: The draws of an evaluation batch, in each process.
        eval_examples: The draws of the validation split, and of the test split.
        probabilities: The distribution, in place of a random one: :math:`K^D` numbers in the order
            of the states' digits (the last dimension runs first), or a nested list of them. They
            are divided by their sum.
        num_workers: The worker processes of each loader.
        seed: Every seed has a distribution and draws of its own.

    Raises:
        UserError: An argument is out of range, or there are more states than can be held.

    References:
        | Discrete Flows: Invertible Generative Models of Discrete Data (Tran et al., 2019), 4.1
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
        super().__init__(length, batch_size, eval_batch_size, num_workers, seed)
        if eval_examples < 1:
            raise UserError(f"eval_examples must be at least 1, not {eval_examples}")
        self._vocabulary = IntegerVocabulary(num_classes)
        if num_classes**length > MOST_STATES:
            raise UserError(
                f"{num_classes} classes in {length} dimensions have more than {MOST_STATES:,} "
                "states, too many to hold: lower length or num_classes"
            )
        self._eval_examples = eval_examples
        self._shape = (num_classes,) * length
        self._table = None if probabilities is None else self._normalized(probabilities)

    @property
    def vocabulary(self) -> IntegerVocabulary:
        """The integers 0..K-1."""
        return self._vocabulary

    @cached_property
    def probabilities(self) -> Tensor:
        """The probability of every state, float64, shape (K,) * D."""
        table = self._table
        if table is None:
            states = self.num_classes**self.length
            table = np.random.default_rng(self.seed).dirichlet(np.ones(states))
        return torch.from_numpy(table.reshape(self._shape))

    @cached_property
    def marginals(self) -> Tensor:
        """The probability of each class in each dimension, float64, shape (D, K)."""
        dimensions = range(self.length)
        return torch.stack(
            [
                self.probabilities.sum([other for other in dimensions if other != dimension])
                if self.length > 1
                else self.probabilities
                for dimension in dimensions
            ]
        )

    @cached_property
    def entropy(self) -> float:
        """The exact entropy in nats: no model has a smaller expected loss."""
        return _entropy(self.probabilities)

    @cached_property
    def factorized_entropy(self) -> float:
        """The expected loss in nats of the best model with independent dimensions."""
        return _entropy(self.marginals)

    def class_counts(self, split: str = "train") -> Tensor:
        """Returns how often each class occurs in a split, a LongTensor of shape (K,).

        Args:
            split: "valid" and "test" are counted; for "train", which has no end, the numbers to be
                expected in a million draws are returned, rounded.
        """
        if split == "train":
            return (self.marginals.sum(0) * EXPECTED_DRAWS).round().long()
        (draws,) = self.evaluation_chunks(split)
        return torch.from_numpy(np.bincount(draws, minlength=self.num_classes))

    def training_stream(self) -> TrainingStream:
        """Returns the endless draws."""
        return _Draws(self._cumulative, self._shape, Counter(self.seed, 0))

    def evaluation_chunks(self, split: str) -> Chunks:
        """Returns the draws of a split, one after the other."""
        key = {"valid": 1, "test": 2}[split]
        draws = _Draws(self._cumulative, self._shape, Counter(self.seed, key))
        return [draws.open()(0, self._eval_examples).reshape(-1)]

    @cached_property
    def _cumulative(self) -> NDArray[np.float64]:
        return np.cumsum(self.probabilities.numpy().reshape(-1))

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


class _Draws(TrainingStream):
    """Creates independent draws, each found in the cumulative distribution by one random number."""

    def __init__(
        self, cumulative: NDArray[np.float64], shape: tuple[int, ...], counter: Counter
    ) -> None:
        super().__init__(len(shape))
        self._cumulative = cumulative
        self._shape = shape
        self._counter = counter
        # Rounding may not carry a draw beyond the last state that has any probability.
        self._last = int(np.searchsorted(cumulative, cumulative[-1]))

    def open(self) -> Reader:
        """Returns what reads draws, of any number at any time."""
        return self._read

    def _read(self, first: int, rows: int) -> Array:
        uniform = self._counter.uniform(np.arange(first, first + rows))
        states = np.searchsorted(self._cumulative, uniform * self._cumulative[-1], side="right")
        return np.stack(np.unravel_index(np.minimum(states, self._last), self._shape), axis=-1)


def _entropy(probabilities: Tensor) -> float:
    return float(torch.special.entr(probabilities).sum())
