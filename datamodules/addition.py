"""Addition: the sum of two numbers, given both digit by digit."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.chunks import Array, Chunks
from datamodules.counter_rng import CounterRNG
from datamodules.enumerable import EXPECTED_SAMPLES
from datamodules.module import StreamDataModule, check_examples
from datamodules.vocabulary import IntegerVocabulary
from datamodules.windows import TrainingStream
from dflows.errors import UserError

__all__ = ["AdditionDataModule"]

MOST_PAIRS = 1 << 62
"""The most pairs that are numbered: no training sees as many."""
LONGEST_EPOCH = 1 << 32
"""The most rows of an epoch: no training sees the end of more."""
ROUNDS = 4


def _num_pairs(num_classes: int, length: int) -> int:
    """Returns the number of pairs of addends, at most :data:`MOST_PAIRS`."""
    return min(num_classes ** min(2 * length, MOST_PAIRS.bit_length()), MOST_PAIRS)


class AdditionDataModule(StreamDataModule):
    r"""Creates sums of D digits, given their addends.

    A batch is a pair of LongTensors of digits 0..K-1, the most significant first: the sums (B, D),
    and their context, the two addends of each (B, 2, D). The carry beyond the first digit is
    dropped. The addends are uniform, and so is the sum; given the addends it is certain. Decoded
    from the left, a digit depends on carries that are not known yet.

    All :math:`K^{2D}` pairs of addends are numbered in an order that the seed shuffles. The first
    are the validation split, the next the test split, and all others the training stream. The order
    has every pair once: no pair of one split occurs in another, and training repeats none before it
    has seen all.

    Args:
        length: The digits of a number, D.
        num_classes: The base of the digits, K.
        batch_size: The sums of a training batch, in each process.
        eval_batch_size: The sums of an evaluation batch, in each process.
        eval_examples: The sums of the validation split, and of the test split.
        num_workers: The worker processes of each loader.
        seed: The seed of the order.

    Raises:
        UserError: If an argument is out of range, or evaluation leaves no pair to train on.

    References:
        | Discrete Flows: Invertible Generative Models of Discrete Data (Tran et al., 2019)
        | https://arxiv.org/abs/1905.10347
        | How to construct pseudorandom permutations from pseudorandom functions
        | (Luby and Rackoff, 1988), for the order
        | https://doi.org/10.1137/0217022

    Example:
        >>> data = AdditionDataModule(length=4, batch_size=2)
        >>> total, addends = next(iter(data.train_dataloader()))
        >>> total.shape, addends.shape
        (torch.Size([2, 4]), torch.Size([2, 2, 4]))
        >>> for number in (*addends[0], total[0]):
        ...     print(data.decode(number))
        6 6 1 4
        4 8 4 9
        1 4 6 3
    """

    def __init__(
        self,
        length: int = 10,
        num_classes: int = 10,
        batch_size: int = 256,
        eval_batch_size: int = 1024,
        *,
        eval_examples: int = 10_000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(length, batch_size, eval_batch_size, num_workers, seed)
        check_examples(eval_examples, 3 * length)
        self._vocabulary = IntegerVocabulary(num_classes)
        pairs = _num_pairs(num_classes, length)
        if pairs <= 2 * eval_examples:
            raise UserError(
                f"{length} digits to the base {num_classes} have {pairs:,} pairs of addends, and "
                f"eval_examples={eval_examples} takes {2 * eval_examples:,} for validation and "
                "test: lower it, so that some are left to train on"
            )
        self._eval_examples = eval_examples

    @property
    def vocabulary(self) -> IntegerVocabulary:
        """The digits 0..K-1."""
        return self._vocabulary

    @property
    def entropy(self) -> float:
        """The exact entropy given the addends: 0 nats, for the sum is certain."""
        return 0.0

    @property
    def entropy_from_left(self) -> float:
        """The least loss in nats of a model that reads addends and sum from the left, together.

        The carry from the digits to the right makes a digit of the sum uncertain, unless the
        addends' digits add up to K - 1: then that carry is also the one to the left, which is
        known.
        """
        total = 0.0
        for place in range(self.length):
            carry = (1 - float(self.num_classes) ** (place + 1 - self.length)) / 2
            if carry:
                known = 1 / self.num_classes if place else 0.0
                total -= (1 - known) * (carry * math.log(carry) + (1 - carry) * math.log(1 - carry))
        return total

    @property
    def row_length(self) -> int:
        """The numbers of a row: a sum and its addends."""
        return 3 * self.length

    @staticmethod
    def batch_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sums (B, D) and their addends (B, 2, D) of rows (B, 3D)."""
        numbers = rows.unflatten(1, (3, -1))
        return numbers[:, 0].contiguous(), numbers[:, 1:].contiguous()

    def class_counts(self, split: str = "train") -> Tensor:
        """Returns how often each digit occurs in the sums of a split, a LongTensor of shape (K,).

        Args:
            split: "valid" and "test" are counted; "train" has the counts expected in a million
                sums, rounded.
        """
        if split == "train":
            each = round(EXPECTED_SAMPLES * self.length / self.num_classes)
            return torch.full((self.num_classes,), each)
        (rows,) = self.evaluation_chunks(split)
        sums = rows.reshape(-1, self.row_length)[:, : self.length]
        return torch.from_numpy(np.bincount(sums.reshape(-1), minlength=self.num_classes))

    def training_stream(self) -> TrainingStream:
        """Returns the endless sums, each with its addends."""
        return self._sums(2 * self._eval_examples)

    def evaluation_chunks(self, split: str) -> Chunks:
        """Returns the sums of a split, each with its addends."""
        first = {"valid": 0, "test": self._eval_examples}[split]
        return [self._sums(first).read(0, self._eval_examples).reshape(-1)]

    def _sums(self, first: int) -> "_Sums":
        return _Sums(self.length, self.num_classes, self.seed, first)


class _Sums(TrainingStream):
    """Creates sums with their addends: all pairs, in a random order with random access.

    The order is a Feistel network over the digits of a pair's number. A round keeps one addend and
    adds random digits, seeded by it, to the other, digit by digit and modulo K. Every round can be
    undone, so every pair occurs once.
    """

    def __init__(self, length: int, num_classes: int, seed: int, first: int) -> None:
        super().__init__(3 * length)
        self._digits = length
        self._num_classes = num_classes
        self._first = first
        self._pairs = _num_pairs(num_classes, length)
        self._counters = [CounterRNG(seed, number) for number in range(ROUNDS)]

    @property
    def rows_per_epoch(self) -> int | None:
        """The pairs that are not held out, or `None` where they exceed any training."""
        pairs = self._pairs - self._first
        return pairs if pairs <= LONGEST_EPOCH else None

    def read(self, first: int, rows: int) -> Array:
        # After the last pair the stream begins again with the first that is not held out.
        begin = first % (self._pairs - self._first)
        numbers = np.arange(begin, begin + rows) % (self._pairs - self._first) + self._first
        digits = np.empty((rows, 2 * self._digits), np.int64)
        for place in range(2 * self._digits):
            numbers, digits[:, -1 - place] = np.divmod(numbers, self._num_classes)
        one, other = digits[:, : self._digits], digits[:, self._digits :]
        for counter in self._counters:
            one, other = other, (one + self._random_digits(counter, other)) % self._num_classes
        return np.concatenate([self._sum(one, other), one, other], axis=1)

    def _random_digits(self, counter: CounterRNG, digits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns random digits (n, D), seeded by others (n, D)."""
        state = np.zeros(len(digits), np.uint64)
        for digit in digits.T:
            state = counter.bits(state + digit.astype(np.uint64))
        uniform = counter.uniform(state[:, None] + np.arange(self._digits).astype(np.uint64))
        return (uniform * self._num_classes).astype(np.int64)

    def _sum(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
        total = one + other
        for place in range(self._digits - 1, 0, -1):
            total[:, place - 1] += total[:, place] // self._num_classes
        return total % self._num_classes
