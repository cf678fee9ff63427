"""The composition of transforms."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dflows.representations import batch_shape
from dflows.transforms.transform import DiscreteTransform

__all__ = ["Composition"]


class Composition(DiscreteTransform):
    """Creates a transform that applies others one after the other.

    Arguments:
        transforms: Transforms in the order base → data.
    """

    def __init__(self, transforms: Sequence[DiscreteTransform]) -> None:
        super().__init__()
        self.transforms = cast("Sequence[DiscreteTransform]", nn.ModuleList(transforms))

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        return any(transform.takes_context for transform in self.transforms)

    @property
    def passes(self) -> int:
        return sum(transform.passes for transform in self.transforms)

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = torch.zeros(batch_shape(x), device=x.device)
        for transform in self.transforms:
            x, ladj = transform.call_and_ladj(x, context)
            total = total + ladj
        return x, total

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = torch.zeros(batch_shape(y), device=y.device)
        for transform in reversed(self.transforms):
            y, ladj = transform.inverse_and_ladj(y, context)
            total = total + ladj
        return y, total

    def fixed_point(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, int]:
        evaluations = 0
        for transform in self.transforms:
            x, count = transform.fixed_point(x, context)
            evaluations += count
        return x, evaluations
