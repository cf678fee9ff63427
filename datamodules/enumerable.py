"""Samples from distributions of which everything is known exactly: those given as a table."""

from abc import abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.chunks import Array, Chunks
from datamodules.counter_rng import CounterRNG
from datamodules.module import StreamDataModule, check_examples
from datamodules.vocabulary import IntegerVocabulary
from datamodules.windows import TrainingStream
from dflows.categorical import cdf, search_cdf
from dflows.checks import check_above_entropy
from dflows.exact import check_enumerable, entropy, expected_loss, marginals, states
from dflows.reporting import Report

__all__ = ["EnumerableDataModule"]

EXPECTED_SAMPLES = 1_000_000
SHOWN_STATES = 10_000


class EnumerableDataModule(StreamDataModule):
    r"""Independent samples from a distribution over all :math:`K^D` states.

    A subclass returns the table of its probabilities from `tabulate`. The training stream has no
    end: sample number n is the same whoever computes it, and every process and worker computes its
    own. The evaluation splits are fixed.

    Args:
        length: The number of dimensions, D.
        num_classes: The number of classes, K.
        batch_size: The samples of a training batch, in each process.
        eval_batch_size: The samples of an evaluation batch, in each process.
        eval_examples: The samples of the validation split, and of the test split.
        enumerated: Whether the table is sure to be needed, so that too many states are refused at
            once and not when it is asked for.
        num_workers: The worker processes of each loader.
        seed: Every seed has samples of its own.

    Raises:
        UserError: If an argument is out of range, or there are more states than can be held.

    Example:
        >>> class Coins(EnumerableDataModule):
        ...     def __init__(self, length):
        ...         super().__init__(length, 2, 4, 4, eval_examples=8, num_workers=0, seed=0)
        ...
        ...     def tabulate(self):
        ...         return torch.full((2,) * self.length, 0.5**self.length, dtype=torch.double)
        >>> data = Coins(length=3)
        >>> round(data.entropy, 4)  # 3 ln 2
        2.0794
        >>> data.decode(next(iter(data.train_dataloader()))[0])
        '0 1 1'
    """

    def __init__(
        self,
        length: int,
        num_classes: int,
        batch_size: int,
        eval_batch_size: int,
        *,
        eval_examples: int,
        enumerated: bool = True,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(length, batch_size, eval_batch_size, num_workers, seed)
        if enumerated:
            check_enumerable(num_classes, length)
        check_examples(eval_examples, length)
        self._vocabulary = IntegerVocabulary(num_classes)
        self._eval_examples = eval_examples

    @abstractmethod
    def tabulate(self) -> Tensor:
        """Returns the probability of every state, float64, shape (K,) * D."""

    @property
    def vocabulary(self) -> IntegerVocabulary:
        """The integers 0..K-1."""
        return self._vocabulary

    @cached_property
    def probabilities(self) -> Tensor:
        """The probability of every state, float64, shape (K,) * D.

        Raises:
            UserError: If there are more states than can be held.
        """
        check_enumerable(self.num_classes, self.length)
        return self.tabulate()

    @cached_property
    def marginals(self) -> Tensor:
        """The probability of each class in each dimension, float64, shape (D, K)."""
        return marginals(self.probabilities)

    @cached_property
    def entropy(self) -> float:
        """The exact entropy in nats: no model has a smaller expected loss."""
        return entropy(self.probabilities)

    @cached_property
    def factorized_entropy(self) -> float:
        """The expected loss in nats of the best model with independent dimensions."""
        return float(torch.special.entr(self.marginals).sum())

    def expected_nats(self, model: Any) -> float:
        """Sums the loss of a model over all states, weighted by their true probabilities.

        Args:
            model: A module with a `log_prob` of indices, without a context.

        Returns:
            The exact cross-entropy, nats per example.

        Raises:
            CertificateError: If it lies below the entropy, as it can only where the model is no
                distribution.
        """
        nll = expected_loss(model, model.log_prob, self.probabilities)
        check_above_entropy(nll, self.entropy)
        return nll

    def report_expected(self, model: Any, max_states: int) -> Report:
        """Reports the exact expected loss of a model, where there are not too many states.

        Args:
            model: A module with exact likelihoods, `log_prob`, without a context.
            max_states: Distributions of more states are not summed over.

        Raises:
            CertificateError: If it lies below the entropy.
        """
        report = Report({"factorized_entropy": self.factorized_entropy})
        count = self.num_classes**self.length
        if count > max_states or model.likelihood != "exact":
            return report
        nats = self.expected_nats(model)
        report.metrics |= {
            "exact_nats": nats,
            "kl": nats - self.entropy,
            "factorized_kl": self.factorized_entropy - self.entropy,
        }
        if self.length == 2 and count <= SHOWN_STATES:
            y = states(self.num_classes, self.length).to(model.device)
            with torch.no_grad():
                table = model.log_prob(y).double().exp().cpu()
            report.metrics["probabilities"] = [float(f"{value:.4g}") for value in table.tolist()]
        remark = f"entropy {self.entropy:.4f}, best factorized {self.factorized_entropy:.4f}"
        return report.row(f"all {count:,} states, nats", f"{nats:.4f}", remark)

    def class_counts(self, split: str = "train") -> Tensor:
        """Returns how often each class occurs in a split, a LongTensor of shape (K,).

        Args:
            split: "valid" and "test" are counted; for "train", which has no end, the numbers to be
                expected in a million samples are returned, rounded.
        """
        if split == "train":
            return (self.marginals.sum(0) * EXPECTED_SAMPLES).round().long()
        (samples,) = self.evaluation_chunks(split)
        return torch.from_numpy(np.bincount(samples, minlength=self.num_classes))

    def samples(self, key: int) -> TrainingStream:
        """Returns an endless stream of samples, one for each key."""
        shape = (self.num_classes,) * self.length
        return _TableSamples(self._cumulative, shape, CounterRNG(self.seed, key))

    def training_stream(self) -> TrainingStream:
        """Returns the endless samples."""
        return self.samples(0)

    def evaluation_chunks(self, split: str) -> Chunks:
        """Returns the samples of a split, one after the other."""
        read = self.samples({"valid": 1, "test": 2}[split]).read
        return [read(0, self._eval_examples).reshape(-1)]

    @cached_property
    def _cumulative(self) -> Tensor:
        return cdf(self.probabilities.reshape(-1))


class _TableSamples(TrainingStream):
    """Creates independent samples, each found in the table by one random number."""

    def __init__(self, cumulative: Tensor, shape: tuple[int, ...], counter: CounterRNG) -> None:
        super().__init__(len(shape))
        self._cumulative = cumulative
        self._shape = shape
        self._counter = counter

    def read(self, first: int, rows: int) -> Array:
        uniform = torch.from_numpy(self._counter.uniform(np.arange(first, first + rows)))
        states = search_cdf(self._cumulative, uniform).numpy()
        return np.stack(np.unravel_index(states, self._shape), axis=-1)
