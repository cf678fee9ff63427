"""The interface of all bijections: maps of one K-class variable, given logits."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dflows.categorical import select_log_prob
from dflows.errors import UserError
from dflows.gradients import GradientRule, SoftmaxStraightThrough, gumbel_like
from dflows.representations import check_largest, check_logits, is_one_hot

__all__ = ["INITIAL_MARGIN", "Bijection", "SoftmaxBijection"]

INITIAL_MARGIN = 0.1
"""Margin of the identity's logits at initialisation: no tie, and a softmax of any usual temperature
still spreads over all classes."""


class Bijection(nn.Module, ABC):
    """A bijection of {0, …, K-1} whose parameters are read off logits.

    A bijection knows nothing of orderings, networks or objectives: it maps values, indices (…, D)
    or one-hot vectors (…, D, K), given logits (…, D, num_logits), one dimension at a time. It
    decides in float32 or better, whatever the type of the logits, and refuses logits that are not
    finite; that of a class may be -inf.

    Args:
        num_classes: K, at least 2.
        num_logits: Logits that choose the map of one dimension.

    Raises:
        UserError: If K is below 2.
    """

    needs_target: bool
    """Whether the local objective needs a target distribution of x."""
    rule: GradientRule | None
    """How the choice of the map is differentiated; None where no softmax chooses it."""
    each: tuple[int, ...] | None = None
    """The classes of every dimension, where they differ: :class:`PerDimension`."""

    def __init__(self, num_classes: int, num_logits: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(
                f"num_classes is {num_classes}, and a bijection needs at least 2 classes: give more"
            )
        self.num_classes = num_classes
        self.num_logits = num_logits
        self.rule = None

    def at(self, dimensions: Tensor) -> "Bijection":
        """Returns the map of some dimensions.

        Args:
            dimensions: The dimensions (D,) of the values that it is called with.
        """
        return self

    @abstractmethod
    def initial_logits(self) -> Tensor:
        """Returns the logits (num_logits,) of the identity."""

    @abstractmethod
    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """Maps base → data.

        Args:
            x: Indices (…, D) or one-hot vectors (…, D, K).
            logits: Logits (…, D, num_logits).

        Returns:
            Values of the same kind. One-hot vectors have a gradient for `x` and the logits.

        Raises:
            NonFiniteError: If the logits are not finite.
        """

    @abstractmethod
    def inverse(self, y: Tensor, logits: Tensor) -> Tensor:
        """Maps data → base; the inverse of :meth:`forward`, in all else alike."""

    @abstractmethod
    def local_log_likelihood(
        self, y: Tensor, logits: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Computes what the local objective maximises, in nats.

        Args:
            y: Indices (…, D).
            logits: Logits (…, D, num_logits).
            target: Log-probabilities (K,) of the target distribution of x, where `needs_target`.

        Returns:
            Log-likelihoods (…, D).

        Raises:
            NonFiniteError: If the logits are not finite.
        """

    @abstractmethod
    def sample_inverse(
        self, y: Tensor, logits: Tensor, num_samples: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Samples maps, and maps indices data → base with them.

        Args:
            y: Indices (…, D).
            logits: Logits (…, D, num_logits).
            num_samples: S, the number of sampled maps of every dimension.
            temperature: Temperature of the softmax that maps are sampled from.

        Returns:
            Indices (S, …, D), and the log-probabilities (S, …, D) of the sampled maps.

        Raises:
            NonFiniteError: If the logits are not finite.
        """

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}"

    def _checked(self, logits: Tensor) -> Tensor:
        return check_logits(logits, type(self).__name__)


class SoftmaxBijection(Bijection):
    """A bijection whose map is made of choices, each by a softmax over its own logits.

    Args:
        num_classes: K, at least 2.
        num_logits: Logits that choose the map of one dimension.
        rule: How the choices are differentiated; by default the paper's straight-through gradient.

    Raises:
        UserError: If K is below 2.
    """

    rule: GradientRule

    def __init__(self, num_classes: int, num_logits: int, rule: GradientRule | None) -> None:
        super().__init__(num_classes, num_logits)
        self.rule = rule or SoftmaxStraightThrough()

    @abstractmethod
    def choice_logits(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Computes the logits (…, D, M) of each choice, which is their argmax.

        Args:
            logits: Logits (…, D, num_logits).

        Raises:
            NonFiniteError: If the logits are not finite.
        """

    @abstractmethod
    def chosen(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Computes the indices (…, D) of the choices, the first where logits tie.

        Args:
            logits: Logits (…, D, num_logits).

        Raises:
            NonFiniteError: If the logits are not finite.
        """

    @abstractmethod
    def map_by(self, value: Tensor, choices: tuple[Tensor, ...], *, inverse: bool) -> Tensor:
        """Maps values by given choices.

        Args:
            value: Indices (…, D), or one-hot vectors (…, D, K).
            choices: The choices, of the kind of `value`: indices (…, D) or vectors (…, D, M).
            inverse: Whether to map data → base.

        Returns:
            Values of the same kind. One-hot vectors have a gradient for `value` and `choices`.
        """

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return self._mapped(x, logits, inverse=False)

    def inverse(self, y: Tensor, logits: Tensor) -> Tensor:
        return self._mapped(y, logits, inverse=True)

    def _mapped(self, value: Tensor, logits: Tensor, *, inverse: bool) -> Tensor:
        if is_one_hot(value):
            choices = tuple(self.rule(part) for part in self.choice_logits(logits))
        else:
            choices = self.chosen(logits)
        return self.map_by(value, choices, inverse=inverse)

    def _largest(self, logits: Tensor) -> Tensor:
        """Computes the index (…) of the first of the largest logits (…, M), and checks them."""
        largest, choice = logits.detach().max(dim=-1)
        check_largest(largest, type(self).__name__)
        return choice

    def sample_inverse(
        self, y: Tensor, logits: Tensor, num_samples: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        choices, log_probs = [], []
        for part in self.choice_logits(logits):
            log_prob = (part / temperature).log_softmax(dim=-1).expand(num_samples, *part.shape)
            choice = (log_prob.detach() + gumbel_like(log_prob)).argmax(dim=-1)
            choices.append(choice)
            log_probs.append(select_log_prob(log_prob, choice))
        x = self.map_by(y.expand(num_samples, *y.shape), tuple(choices), inverse=True)
        return x, torch.stack(log_probs).sum(dim=0)
