"""The interface of all transforms."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dflows.representations import batch_shape

__all__ = ["DiscreteTransform", "Inverse"]


class DiscreteTransform(nn.Module, ABC):
    """Creates a bijection of {0, …, K-1}^D, after `torch.distributions.Transform`.

    ``transform(x)`` maps base → data and ``transform.inv(y)`` data → base. Both take indices
    (…, D) or one-hot vectors (…, D, K) and return the kind that they were given. Fewer dimensions
    than D are an event of their own. A context, where the transform takes one, has the shape
    (B, C) or (B, S, C), with B the last batch dimension.
    """

    takes_context: bool = True
    """Whether the map may depend on a context."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Network evaluations, one after the other, that base → data takes."""

    @abstractmethod
    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps base → data, and returns the log-determinants (…) beside.

        They are zeros that may carry a gradient (:mod:`dflows.estimators`).
        """

    @abstractmethod
    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps data → base, and returns the log-determinants (…) beside, likewise."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps base → data."""
        return self.call_and_ladj(x, context)[0]

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps data → base."""
        return self.inverse_and_ladj(y, context)[0]

    @property
    def inv(self) -> DiscreteTransform:
        """The inverse, a transform with the same parameters."""
        return Inverse(self)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns zeros of the batch shape: a bijection of a finite set changes no volume."""
        return torch.zeros(batch_shape(y), device=y.device)

    def fixed_point(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, int]:
        """Maps base → data over all positions at once, by iteration until nothing changes.

        Args:
            x: Indices (…, D).
            context: As in :meth:`forward`.

        Returns:
            The same indices as ``transform(x, context)``, and the number of evaluations.
        """
        return self.generate(x, context, fixed_point=True)

    def keeps_beginning(self, number: int, length: int) -> bool:
        """Says whether the first of so many dimensions of y and those of x tell each other."""
        return False

    def generate(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        beginning: Tensor | None = None,
        fixed_point: bool = False,
    ) -> tuple[Tensor, int]:
        """Maps base → data, the first dimensions of which may be known.

        Args:
            x: Indices (…, D).
            context: As in :meth:`forward`.
            beginning: The first dimensions of y (…, n), those that the first of x are mapped to;
                only where :meth:`keeps_beginning` says so.
            fixed_point: Whether to go as :meth:`fixed_point` does.

        Returns:
            Indices (…, D), and the evaluations, one after the other, that they took.
        """
        y = self(x, context)
        if beginning is not None:
            y = torch.cat([beginning, y[..., beginning.shape[-1] :]], dim=-1)
        return y, self.passes


class Inverse(DiscreteTransform):
    """Creates the inverse of a transform.

    Arguments:
        transform: The transform, whose parameters become the inverse's.
    """

    def __init__(self, transform: DiscreteTransform) -> None:
        super().__init__()
        self.transform = transform

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        return self.transform.takes_context

    def keeps_beginning(self, number: int, length: int) -> bool:
        return self.transform.keeps_beginning(number, length)

    @property
    def inv(self) -> DiscreteTransform:
        return self.transform

    @property
    def passes(self) -> int:
        return 1 if self.transform.passes else 0

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_ladj(y, context)
