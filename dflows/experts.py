"""Experts: what adds log-probabilities to a network's logits.

An expert knows something that the network need not learn, such as the n-grams of a training text.
The conditioner weighs its terms by a learned gate.

An expert that was counted on the training data has seen every training example, and the network
would learn to trust it too much. Training therefore scores under :func:`leave_one_out`, so that
experts answer as if the example had not been counted::

    with leave_one_out():
        loss = -flow.log_prob(y).mean()
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from dflows.drafting import Drafter

__all__ = ["Expert", "leave_one_out"]

_left_out: ContextVar["_Scored"] = ContextVar("left_out")


class _Scored:
    """Creates a flag: whether the scored values were counted; None follows the training mode."""

    def __init__(self, counted: bool | None) -> None:
        self.counted = counted


@contextmanager
def leave_one_out(counted: bool | None = None) -> Iterator[None]:
    """Declares that the scored values are part of the data that experts were counted on.

    Experts then leave each value out of the counts that predict it, as if it were new data.
    Contexts nest; the innermost holds.

    Args:
        counted: Whether the values were counted. By default: for experts in training mode.
    """
    token = _left_out.set(_Scored(counted))
    try:
        yield
    finally:
        _left_out.reset(token)


class Expert(nn.Module, ABC):
    """Predicts the classes of a dimension from the dimensions of lower levels.

    Its terms, like a conditioner's logits, must depend on the values of lower levels only. They
    have no gradient with respect to the values.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    @property
    def leaves_one_out(self) -> bool:
        """Whether to leave the scored values out of the counts: :func:`leave_one_out`."""
        scored = _left_out.get(None)
        if scored is None:
            return False
        return self.training if scored.counted is None else scored.counted

    def drafter(self, noise: Tensor, temperature: float = 1.0) -> Drafter | None:
        """Returns what guesses the values that a noise gives: :meth:`dflows.bases.Base.drafter`."""
        return None

    @abstractmethod
    def num_terms(self, levels: Tensor) -> int:
        """Returns the number of terms, each with its own gate.

        Args:
            levels: Levels (D,) of an event of full length.
        """

    @abstractmethod
    def forward(
        self, y: Tensor, levels: Tensor, dimensions: Tensor | None = None, *, num_terms: int
    ) -> Tensor:
        """Computes the terms: log-probabilities or log-likelihoods of every class.

        Args:
            y: Indices (N, d).
            levels: Levels (d,) of an event of this length. Experts may cache by tensor, so pass the
                same tensor for the same levels.
            dimensions: The dimensions to score: all d by default, indices (n,), or a mask (N, d)
                with M true entries.
            num_terms: Number of terms, :meth:`num_terms` of an event of full length. A shorter
                event may have fewer; the others are then 0.

        Returns:
            Terms (N, d, K, num_terms), (N, n, K, num_terms) or (M, K, num_terms).
        """
