"""Bijections of dimensions that have different numbers of classes."""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.bijections.bijection import Bijection
from dflows.classes import Classes
from dflows.representations import is_one_hot
from dflows.views import view

__all__ = ["PerDimension"]


class PerDimension(Bijection):
    """Creates a bijection for every dimension, where these have different numbers of classes.

    Dimensions of equally many classes share one, and whatever parameters it has. One-hot vectors
    are as wide as the largest number of classes, logits as the most that a bijection reads; a
    dimension of fewer uses the first.

    Args:
        bijection: Makes the map of one variable, given its number of classes.
        num_classes: The number of classes of every dimension, each at least 2.

    Raises:
        UserError: If a number is below 2.

    Example:
        >>> from dflows.bijections import ModularShift
        >>> shifts = PerDimension(ModularShift, [2, 3])
        >>> logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])  # both locations are 1
        >>> shifts(torch.tensor([1, 1]), logits)
        tensor([0, 2])
    """

    each: tuple[int, ...]
    numbers: Tensor

    def __init__(self, bijection: Callable[[int], Bijection], num_classes: Sequence[int]) -> None:
        classes = Classes(num_classes, len(num_classes))
        numbers = classes.numbers.tolist()
        members = {number: bijection(number) for number in sorted(set(numbers))}
        most = max(member.num_logits for member in members.values())
        super().__init__(classes.largest, most)
        self.each = tuple(numbers)
        self.members = nn.ModuleDict({str(number): one for number, one in members.items()})
        self.needs_target = any(one.needs_target for one in members.values())
        self.rule = members[classes.largest].rule
        self.register_buffer("numbers", torch.tensor(self.each), persistent=False)
        self._dimensions: Tensor | None = None

    def _members(self) -> list[Bijection]:
        return cast("list[Bijection]", [*self.members.values()])

    def extra_repr(self) -> str:
        return f"num_classes={self.each}"

    def at(self, dimensions: Tensor) -> Bijection:
        return view(self, _dimensions=dimensions)

    def _parts(self, number: int) -> Iterator[tuple[Bijection, Tensor]]:
        """Yields the bijections, each with the places of its dimensions among so many."""
        numbers = self.numbers[:number]
        if self._dimensions is not None:
            numbers = self.numbers[self._dimensions]
        for member in self._members():
            places = (numbers == member.num_classes).nonzero().squeeze(-1)
            # Whoever has parameters is called, so that they have a gradient, if of zeros.
            if len(places) or not len(numbers) or any(True for _ in member.parameters()):
                yield member, places

    def initial_logits(self) -> Tensor:
        """Returns the logits (D, num_logits) of the identity."""
        logits = torch.zeros(len(self.each), self.num_logits)
        for member, places in self._parts(len(self.each)):
            logits[places, : member.num_logits] = member.initial_logits()
        return logits

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return self._mapped(x, logits, inverse=False)

    def inverse(self, y: Tensor, logits: Tensor) -> Tensor:
        return self._mapped(y, logits, inverse=True)

    def _mapped(self, value: Tensor, logits: Tensor, *, inverse: bool) -> Tensor:
        mapped = torch.zeros_like(value)
        along = -2 if is_one_hot(value) else -1
        for member, places in self._parts(logits.shape[-2]):
            part = value.index_select(along, places)
            if is_one_hot(value):
                part = part[..., : member.num_classes]
            image = (member.inverse if inverse else member)(part, _of(member, places, logits))
            if is_one_hot(value):
                image = F.pad(image, (0, self.num_classes - member.num_classes))
            mapped = mapped.index_copy(along, places, image.to(mapped.dtype))
        return mapped

    def local_log_likelihood(
        self, y: Tensor, logits: Tensor, target: Tensor | None = None
    ) -> Tensor:
        found = []
        for member, places in self._parts(logits.shape[-2]):
            own = None if target is None else target[: member.num_classes].log_softmax(dim=-1)
            part = y.index_select(-1, places)
            local = member.local_log_likelihood(part, _of(member, places, logits), own)
            found.append((places, local))
        return _together(found)

    def sample_inverse(
        self, y: Tensor, logits: Tensor, num_samples: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        found = []
        for member, places in self._parts(logits.shape[-2]):
            part, own = y.index_select(-1, places), _of(member, places, logits)
            found.append((places, *member.sample_inverse(part, own, num_samples, temperature)))
        x, log_prob = ([(one[0], one[which]) for one in found] for which in (1, 2))
        return _together(x), _together(log_prob)


def _of(member: Bijection, places: Tensor, logits: Tensor) -> Tensor:
    """Returns what a bijection reads of the logits (…, n, num_logits) of its dimensions."""
    return logits.index_select(-2, places)[..., : member.num_logits]


def _together(found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Puts together parts (…, m) by their places (m,) along the last dimension."""
    order = torch.cat([places for places, _ in found]).argsort()
    return torch.cat([part for _, part in found], dim=-1)[..., order]
