"""The interface of all transforms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dflows.classes import Classes
from dflows.orderings import Ordering
from dflows.representations import batch_shape

__all__ = ["DiscreteTransform", "Inverse"]


class DiscreteTransform(nn.Module, ABC):
    """A bijection of {0, …, K-1}^D, after `torch.distributions.Transform`.

    ``transform(x)`` maps base → data and ``transform.inv(y)`` data → base. Both take indices
    (…, D) or one-hot vectors (…, D, K) and return the same kind; on one-hot vectors they have the
    gradient of the bijections' rules. Events may be shorter than D. A context, where the transform
    takes one, has the shape (B, C) or (B, S, C), with B the last batch dimension.
    """

    takes_context: bool = False
    """Whether the map may depend on a context."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Sequential network evaluations of base → data."""

    @property
    def ordering(self) -> Ordering | None:
        """The ordering of a :class:`~dflows.transforms.ConditionalTransform`; None elsewhere."""
        return None

    def keeps(self, classes: Classes) -> bool:
        """Returns whether events of these classes are mapped onto themselves."""
        return True

    @property
    def parts(self) -> Sequence[DiscreteTransform]:
        """The transforms of a composition, base → data; otherwise itself."""
        return [self]

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps base → data."""

    @abstractmethod
    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps data → base."""

    @property
    def inv(self) -> DiscreteTransform:
        """The inverse, a transform with the same parameters."""
        return Inverse(self)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns zeros of the batch shape: a bijection of a finite set changes no volume."""
        return torch.zeros(batch_shape(y), device=y.device)

    def supports_prefix(self, number: int, length: int) -> bool:
        """Returns whether the first dimensions of y and those of x determine each other."""
        return False

    def generate(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
        fixed_point: bool = False,
    ) -> tuple[Tensor, int]:
        """Maps base → data, given a prefix of y.

        Args:
            x: Indices (…, D).
            context: As in :meth:`forward`.
            prefix: The first dimensions of y (…, n), which the first of x map to; only where
                :meth:`supports_prefix` allows it.
            fixed_point: Whether to iterate over all dimensions at once until nothing changes,
                instead of level by level. The values are the same.

        Returns:
            Indices (…, D), and the number of sequential evaluations.
        """
        y = self(x, context)
        if prefix is not None:
            y = torch.cat([prefix, y[..., prefix.shape[-1] :]], dim=-1)
        return y, self.passes

    def by_levels(
        self, value: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> Tensor:
        """Maps base → data, or data → base, with the same computations in both directions.

        One evaluation of all levels and one a level agree to round-off alone. What has to come back
        whatever the round-off, an archive say, is mapped in this way.

        Args:
            value: Indices (…, D).
            context: As in :meth:`forward`.
            inverse: Whether to map data → base.

        Returns:
            Indices (…, D).
        """
        mapped: Tensor = self.inverse(value, context) if inverse else self(value, context)
        return mapped


class Inverse(DiscreteTransform):
    """Creates the inverse of a transform.

    Args:
        transform: The transform, whose parameters the inverse shares.
    """

    def __init__(self, transform: DiscreteTransform) -> None:
        super().__init__()
        self.transform = transform

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        return self.transform.takes_context

    @property
    def passes(self) -> int:
        return 1 if self.transform.passes else 0

    def keeps(self, classes: Classes) -> bool:
        return self.transform.keeps(classes)

    @property
    def inv(self) -> DiscreteTransform:
        return self.transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.transform.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        x: Tensor = self.transform(y, context)
        return x

    def by_levels(
        self, value: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> Tensor:
        return self.transform.by_levels(value, context, inverse=not inverse)

    def supports_prefix(self, number: int, length: int) -> bool:
        return self.transform.supports_prefix(number, length)
