"""The interface of all bases: the distribution of x."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from dflows.arguments import check_dimensions
from dflows.classes import Classes, NumClasses
from dflows.decoding import Decide
from dflows.drafting import Drafter
from dflows.errors import UserError
from dflows.orderings import Ordering

__all__ = ["Base", "ClosedFormBase"]


ONE_ORDERING = (
    "has one ordering, and is conditioned on what this takes first: train a flow of "
    "dflows.flows.any_order, or over an ordering that takes the known dimensions first"
)


class Base(nn.Module, ABC):
    """A distribution of x in {0, …, K-1}^D.

    Args:
        num_classes: K, or one number a dimension.
        length: D, the largest number of dimensions; fewer are an event of their own.

    Attributes:
        classes: The classes of every dimension; `num_classes` is the largest number of them.

    Raises:
        UserError: If there are not as many numbers as dimensions, or one is below 1.
    """

    scores_parts: ClassVar[bool]
    """Whether some dimensions can be scored without the others."""

    differentiable: ClassVar[bool] = True
    """Whether log-probabilities have a gradient with respect to one-hot vectors."""

    takes_context: bool = False
    """Whether the distribution may depend on a context."""

    any_order: ClassVar[bool] = False
    """Whether it serves all orderings."""

    def __init__(self, num_classes: NumClasses, length: int) -> None:
        super().__init__()
        self.length = check_dimensions(length)
        self.classes = Classes(num_classes, length)
        self.num_classes = self.classes.largest

    def adapt(self, orderings: Sequence[Ordering]) -> None:
        """Adapts to the orderings of the transforms; the flow calls it when it is created.

        Args:
            orderings: Those of the conditional transforms, base → data.

        Raises:
            UserError: If the distribution has been adapted to other orderings.
        """

    @property
    def ordering(self) -> Ordering | None:
        """Which dimensions condition which; None where the base has no levels."""
        return None

    @property
    @abstractmethod
    def passes(self) -> int:
        """Sequential network evaluations for a batch of samples."""

    def with_passes(self, passes: int) -> "Base":
        """Returns this base with another number of passes; both share all parameters.

        Raises:
            UserError: If it cannot have so many.
        """
        raise UserError(
            f"a {type(self).__name__} cannot have another number of passes: train an "
            "AutoregressiveBase over Strided"
        )

    def with_ordering(self, ordering: Ordering) -> "Base":
        """Returns this base over another ordering; both share all parameters.

        Raises:
            UserError: If it serves one ordering alone.
        """
        raise UserError(f"a {type(self).__name__} {ONE_ORDERING}")

    def with_length(self, length: int) -> "Base":
        """Returns this base over events of another length; both share all parameters.

        Raises:
            UserError: If it has parameters for each dimension.
        """
        raise UserError(
            f"a {type(self).__name__} cannot have another length: train an AutoregressiveBase over "
            "Strided"
        )

    @abstractmethod
    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Computes the log-probability of every dimension given those before it, in nats.

        Args:
            x: Indices (N, d) or one-hot vectors (N, d, K).
            context: Vectors (N, C) or sequences (N, S, C).

        Returns:
            Log-probabilities (N, d), whose sum is that of the event.
        """

    def sampled_log_prob(
        self, x: Tensor, context: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Computes an unbiased estimate of the event's log-probability, at one evaluation.

        A base that takes one evaluation a level evaluates one level, sampled for every example.

        Args:
            x: As in :meth:`log_prob`; correct where the weight is not 0.
            context: As in :meth:`log_prob`.
            weight: Weights (N, d) of the dimensions; 1 by default.

        Returns:
            Log-probabilities (N,).
        """
        log_prob = self.log_prob(x, context)
        return (log_prob if weight is None else log_prob * weight).sum(dim=-1)

    @abstractmethod
    def noise(self, num_samples: int, length: int, generator: Generator | None = None) -> Tensor:
        """Draws all the randomness of samples: a uniform number for every dimension.

        Args:
            num_samples: N.
            length: Dimensions d of an event.
            generator: Source of randomness.

        Returns:
            Numbers (N, d) from 0 to below 1.
        """

    @abstractmethod
    def from_noise(
        self,
        noise: Tensor,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        fixed_point: bool = False,
        prefix: Tensor | None = None,
        draft: "Base | None" = None,
    ) -> tuple[Tensor, int]:
        """Turns noise into samples.

        Args:
            noise: Numbers (N, d) from :meth:`noise`.
            context: Vectors (N, C) or sequences (N, S, C).
            temperature: Divides the logits; 1 samples the distribution itself.
            fixed_point: Whether to iterate over all dimensions at once instead of level by level.
                The samples are the same.
            prefix: Values of the first dimensions, indices (N, n), given which the others are
                sampled; only where :meth:`supports_prefix` allows it.
            draft: A base with a :meth:`drafter`, whose guesses are the start of the iterations.

        Returns:
            Indices (N, d), and the number of sequential evaluations.
        """

    def drafter(self, noise: Tensor, temperature: float = 1.0) -> Drafter | None:
        """Returns what guesses the samples of another base, if it does so without a network.

        Where the two distributions are alike, the same noise gives the same values.

        Args:
            noise: Numbers (N, d) from 0 to below 1.
            temperature: Divides the logits.
        """
        return None

    @abstractmethod
    def supports_prefix(self, number: int, length: int) -> bool:
        """Returns whether the rest can be sampled exactly given the first `number` dimensions."""

    def sample(
        self,
        num_samples: int,
        length: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: Generator | None = None,
        fixed_point: bool = False,
    ) -> Tensor:
        """Draws samples.

        Args:
            num_samples: N.
            length: Dimensions d of an event.
            context: As in :meth:`from_noise`, as are temperature and fixed_point.
            temperature: Divides the logits.
            generator: Source of randomness.
            fixed_point: Whether to iterate.

        Returns:
            Indices (N, d).
        """
        noise = self.noise(num_samples, length, generator)
        return self.from_noise(noise, context, temperature=temperature, fixed_point=fixed_point)[0]

    def complete(
        self,
        x: Tensor,
        known: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Decides the values that are not known, given those that are, level by level.

        Args:
            x: Indices (N, d); unknown ones do not matter.
            known: Which of them are known, (N, d).
            context: Vectors (N, C) or sequences (N, S, C).
            noise: Numbers (N, d) from :meth:`noise`, of exact samples; by default the likeliest
                value is taken, given those decided before.

        Returns:
            Indices (N, d).

        Raises:
            UserError: If it serves one ordering alone.
        """
        raise UserError(f"a {type(self).__name__} {ONE_ORDERING}")

    def log_prob_given(self, x: Tensor, known: Tensor, context: Tensor | None = None) -> Tensor:
        """Computes the log-probability of every unknown value, given those that are known.

        Args:
            x: Indices (N, d).
            known: Which of them are known, (N, d).
            context: As in :meth:`complete`.

        Returns:
            Log-probabilities (N, d), each given the known values and unknown ones of lower levels;
            0 where a value is known.

        Raises:
            UserError: If it serves one ordering alone.
        """
        raise UserError(f"a {type(self).__name__} {ONE_ORDERING}")

    def random_order_log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Estimates the mean log-probability over all orders of the dimensions, without a bias.

        Args:
            x: Indices (N, d).
            context: Vectors (N, C) or sequences (N, S, C).

        Returns:
            Log-probabilities (N,), in nats.

        Raises:
            UserError: If it serves one ordering alone.
        """
        raise UserError(f"a {type(self).__name__} {ONE_ORDERING}")

    @property
    @abstractmethod
    def greedy_is_mode(self) -> bool:
        """Whether :meth:`greedy` is the mode, as it is of independent dimensions."""

    @abstractmethod
    def decode(
        self,
        decide: Decide,
        num_values: int,
        length: int,
        context: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Decides values level by level, with one evaluation each.

        Args:
            decide: Decides the values of a level, given its dimensions and the logits (N, n, K) of
                their distributions given all lower levels. It is asked once for every dimension.
            num_values: N.
            length: Dimensions d of an event.
            context: Vectors (N, C) or sequences (N, S, C).
            prefix: As in :meth:`from_noise`.

        Returns:
            Indices (N, d).
        """

    def conditionals(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Computes the distribution of every dimension, given those of lower levels.

        Args:
            x: Indices (N, d).
            context: As in :meth:`log_prob`.

        Returns:
            Log-probabilities (N, d, K), in nats; those of `x` are :meth:`log_prob`.
        """
        places, found = [], []

        def decide(dimensions: Tensor, logits: Tensor) -> Tensor:
            places.append(dimensions)
            found.append(logits.log_softmax(dim=-1))
            return x[:, dimensions]

        self.decode(decide, len(x), x.shape[1], context)
        return torch.cat(found, dim=1)[:, torch.cat(places).argsort()]

    def greedy(self, num_values: int, length: int, context: Tensor | None = None) -> Tensor:
        """Returns the most likely value of every dimension, given those decided before it.

        Args:
            num_values: N.
            length: Dimensions d of an event.
            context: Vectors (N, C) or sequences (N, S, C).

        Returns:
            Indices (N, d), the mode where :attr:`greedy_is_mode`.
        """
        return self.decode(lambda _, logits: logits.argmax(dim=-1), num_values, length, context)

    @abstractmethod
    def init_from_counts(self, counts: Tensor) -> None:
        """Initialises the distribution from the counts of the training data's classes.

        Args:
            counts: Counts (K,), or (D, K) of every dimension.
        """


class ClosedFormBase(Base):
    """A base with a closed-form maximum-likelihood fit."""

    @abstractmethod
    def count(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Counts data.

        Args:
            x: Indices (N, d).
            weight: Weights (N, d) of the dimensions; 1 by default.

        Returns:
            Counts in float64, of a fixed shape, which add up over batches.
        """

    @abstractmethod
    def refit(self, counts: Tensor) -> None:
        """Fits the distribution to counts, sums of :meth:`count`, by maximum likelihood."""
