"""The composition of transforms."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.classes import Classes
from dflows.transforms.transform import DiscreteTransform

__all__ = ["Composition", "invert_prefix"]


class Composition(DiscreteTransform):
    """Creates a transform that applies others in sequence.

    Args:
        transforms: Transforms in the order base → data.
    """

    def __init__(self, transforms: Sequence[DiscreteTransform]) -> None:
        super().__init__()
        self.transforms = cast("Sequence[DiscreteTransform]", nn.ModuleList(transforms))

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        return any(transform.takes_context for transform in self.transforms)

    def keeps(self, classes: Classes) -> bool:
        return all(transform.keeps(classes) for transform in self.transforms)

    @property
    def passes(self) -> int:
        return sum(transform.passes for transform in self.transforms)

    @property
    def parts(self) -> list[DiscreteTransform]:
        return [part for transform in self.transforms for part in transform.parts]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for transform in self.transforms:
            x = transform(x, context)
        return x

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        for transform in reversed(self.transforms):
            y = transform.inverse(y, context)
        return y

    def by_levels(
        self, value: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> Tensor:
        for transform in reversed(self.transforms) if inverse else self.transforms:
            value = transform.by_levels(value, context, inverse=inverse)
        return value

    def supports_prefix(self, number: int, length: int) -> bool:
        return all(transform.supports_prefix(number, length) for transform in self.transforms)

    def generate(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
        fixed_point: bool = False,
    ) -> tuple[Tensor, int]:
        known: list[Tensor | None] = [None] * len(self.transforms)
        if prefix is not None:
            known[:] = invert_prefix(self.transforms, prefix, x.shape[-1], context)[1:]
        evaluations = 0
        for transform, part in zip(self.transforms, known, strict=True):
            x, count = transform.generate(x, context, prefix=part, fixed_point=fixed_point)
            evaluations += count
        return x, evaluations


@torch.no_grad()
def invert_prefix(
    transforms: Sequence[DiscreteTransform],
    prefix: Tensor,
    length: int,
    context: Tensor | None = None,
) -> list[Tensor]:
    """Finds the prefixes of x and of every transform's value, given that of y.

    Args:
        transforms: Transforms in the order base → data, all of which support the prefix.
        prefix: The first dimensions of y (…, n).
        length: Dimensions of y.
        context: The encoded context.

    Returns:
        Indices (…, n): of x, and then of every transform's value; the last is `prefix`.
    """
    number = prefix.shape[-1]
    found = [prefix]
    for transform in reversed(transforms):
        # The prefix does not depend on what follows.
        anything = F.pad(found[-1], (0, length - number))
        found.append(transform.inverse(anything, context)[..., :number])
    return found[::-1]
