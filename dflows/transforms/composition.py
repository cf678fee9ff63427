"""The composition of transforms."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.representations import batch_shape
from dflows.transforms.transform import DiscreteTransform

__all__ = ["Composition", "beginnings"]


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

    def keeps_beginning(self, number: int, length: int) -> bool:
        return all(transform.keeps_beginning(number, length) for transform in self.transforms)

    def generate(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        beginning: Tensor | None = None,
        fixed_point: bool = False,
    ) -> tuple[Tensor, int]:
        known: list[Tensor | None] = [None] * len(self.transforms)
        if beginning is not None:
            known[:] = beginnings(self.transforms, beginning, x.shape[-1], context)[1:]
        evaluations = 0
        for transform, part in zip(self.transforms, known, strict=True):
            x, count = transform.generate(x, context, beginning=part, fixed_point=fixed_point)
            evaluations += count
        return x, evaluations


@torch.no_grad()
def beginnings(
    transforms: Sequence[DiscreteTransform],
    beginning: Tensor,
    length: int,
    context: Tensor | None = None,
) -> list[Tensor]:
    """Finds how x and what every transform makes of it begin, from how y does.

    Args:
        transforms: Transforms in the order base → data, all of which keep the beginning.
        beginning: The first dimensions of y (…, n).
        length: Dimensions of y.
        context: As the transforms take it.

    Returns:
        Indices (…, n): of x, and then of every transform's value; the last is `beginning`.
    """
    number = beginning.shape[-1]
    found = [beginning]
    for transform in reversed(transforms):
        # What follows is anything, for the beginning does not depend on it.
        anything = F.pad(found[-1], (0, length - number))
        found.append(transform.inverse(anything, context)[..., :number])
    return found[::-1]
