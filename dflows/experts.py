"""Experts: what adds log-probabilities of its own to a network's logits.

An expert knows something about the values that the network need not learn, such as the n-grams of a
training text. Whoever owns the network weighs what the expert says by a learned gate.

An expert that was counted on the training data has seen every example that training scores. It then
knows the answer, and the network would learn to trust it too much. Training therefore scores under
:func:`leave_one_out`, which tells experts to answer as if the example had not been counted::

    with leave_one_out():
        loss = -flow.log_prob(y).mean()
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

__all__ = ["Expert", "leave_one_out"]

_left_out: ContextVar["_Scored"] = ContextVar("left_out")


class _Scored:
    """Creates a note of whether the values scored were counted; None asks the training mode."""

    def __init__(self, counted: bool | None) -> None:
        self.counted = counted


@contextmanager
def leave_one_out(counted: bool | None = None) -> Iterator[None]:
    """Tells experts that the values scored are part of the data that they were counted on.

    They leave each value out of the counts that predict it, so that training sees what new data
    will see. Contexts nest; the innermost holds.

    Args:
        counted: Whether the values were counted. By default they were for experts in training mode,
            and not for those in evaluation mode.
    """
    token = _left_out.set(_Scored(counted))
    try:
        yield
    finally:
        _left_out.reset(token)


class Expert(nn.Module, ABC):
    """Says how likely the classes are, given the dimensions of lower levels.

    What it says of a dimension must depend on the values of lower levels only, as a conditioner's
    logits do. It has no gradient with respect to the values.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    @property
    def leaves_one_out(self) -> bool:
        """Whether the values scored are to be left out of the counts: :func:`leave_one_out`."""
        scored = _left_out.get(None)
        if scored is None:
            return False
        return self.training if scored.counted is None else scored.counted

    @abstractmethod
    def num_terms(self, levels: Tensor) -> int:
        """Returns how many terms the expert has, each with a gate of its own.

        Args:
            levels: Levels (D,) of an event of full length.
        """

    @abstractmethod
    def forward(
        self, y: Tensor, levels: Tensor, dimensions: Tensor | None = None, *, num_terms: int
    ) -> Tensor:
        """Computes log-probabilities or log-likelihoods of every class.

        Args:
            y: Indices (N, d).
            levels: Levels (d,) of an event of this length. What follows from them may be
                remembered, so hand over the same tensor for the same levels.
            dimensions: The dimensions asked for: all d by default, indices (n,), or a mask (N, d)
                with M true entries.
            num_terms: Terms asked for, :meth:`num_terms` of an event of full length. A shorter
                event may have fewer; the others are then 0.

        Returns:
            Terms (N, d, K, num_terms), (N, n, K, num_terms) or (M, K, num_terms), to be added to
            logits (…, K) after they are weighed.
        """
