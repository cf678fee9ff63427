"""The numbers of classes of an event: one for all dimensions, or one for each."""

import math
import operator
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dflows.errors import UserError

__all__ = ["Classes", "NumClasses", "numbers_of"]

SHOWN = 12
"""The most numbers that a message has."""

NumClasses: TypeAlias = int | Sequence[int]
"""K, the classes of every dimension; or K_d, one number for each of D dimensions."""


def numbers_of(num_classes: NumClasses) -> int | tuple[int, ...]:
    """Returns a number of classes, or several, as Python's integers.

    Raises:
        UserError: If it is no whole number, or an empty sequence.

    Example:
        >>> numbers_of(torch.tensor([2, 3]))
        (2, 3)
    """
    try:
        return operator.index(num_classes)  # type: ignore[arg-type]
    except TypeError:
        pass
    try:
        numbers = tuple(map(operator.index, num_classes))  # type: ignore[arg-type]
    except TypeError:
        raise UserError(
            f"num_classes is {num_classes}: give a whole number, or one for each dimension"
        ) from None
    if not numbers:
        raise UserError("num_classes is empty: give a whole number, or one for each dimension")
    return numbers


class Classes:
    """Creates the numbers of classes of D dimensions.

    One-hot vectors and logits are as wide as the largest of them.

    Args:
        numbers: K, or one number a dimension.
        length: D.

    Attributes:
        given: K, or all numbers: what makes the same classes again.
        largest: K, or the largest number.
        each: The number of every dimension, where they are given one by one; None otherwise.

    Raises:
        UserError: If there are not as many numbers as dimensions, or one is below 1.

    Example:
        >>> classes = Classes([2, 3], length=2)
        >>> classes.largest, classes.count(), classes.states()[:3].tolist()
        (3, 6, [[0, 0], [1, 0], [0, 1]])
        >>> classes.absent
        tensor([[False, False,  True],
                [False, False, False]])
    """

    def __init__(self, numbers: NumClasses, length: int) -> None:
        self.length = length
        self.given = found = numbers_of(numbers)
        self.each = None if isinstance(found, int) else found
        self.largest = found if isinstance(found, int) else max(found)
        if self.each is not None and len(self.each) != length:
            raise UserError(
                f"num_classes has {len(self.each)} numbers, and there are {length} dimensions: "
                "give one for each, or one for all"
            )
        if min(self.each or (self.largest,)) < 1:
            raise UserError(f"num_classes is {found}: give at least 1")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Classes):
            return NotImplemented
        return (self.each, self.largest) == (other.each, other.largest)

    def __hash__(self) -> int:
        return hash((self.each, self.largest))

    def __str__(self) -> str:
        if self.each is None:
            return str(self.largest)
        shown = ", ".join(map(str, self.each[:SHOWN]))
        return shown if len(self.each) <= SHOWN else f"{shown}, …"

    @property
    def numbers(self) -> Tensor:
        """The number of classes of every dimension (D,)."""
        return torch.tensor(self.each or (self.largest,) * self.length)

    @property
    def absent(self) -> Tensor | None:
        """The classes (D, K) that a dimension has not, boolean; None where all have as many."""
        if self.each is None:
            return None
        return torch.arange(self.largest) >= self.numbers.unsqueeze(-1)

    def count(self, length: int | None = None) -> int:
        """Returns the number of states of the first dimensions; of all by default."""
        length = self.length if length is None else length
        if self.each is None:
            return self.largest**length
        return math.prod(self.each[:length])

    def states(self, numbers: Tensor | None = None, length: int | None = None) -> Tensor:
        """Returns states of the first dimensions, in an order in which the first changes fastest.

        Args:
            numbers: Which ones, (N,); all by default.
            length: Dimensions d; D by default.

        Returns:
            Indices (N, d).
        """
        length = self.length if length is None else length
        if numbers is None:
            numbers = torch.arange(self.count(length))
        sizes = self.numbers[:length].to(numbers.device)
        powers = torch.cat([sizes.new_ones(1), sizes[:-1].cumprod(0)])
        return numbers.unsqueeze(-1) // powers % sizes

    def draw(self, shape: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """Draws values (N, d), each class of a dimension as likely as any other."""
        if self.each is None:
            return torch.randint(self.largest, shape, device=device)
        sizes = self.numbers[: shape[1]].to(device)
        return (torch.rand(shape, dtype=torch.double, device=device) * sizes).long()

    def shift(self, y: Tensor, steps: Tensor | int) -> Tensor:
        """Returns the classes so many steps after values (…, d), modulo their number."""
        return (y + steps) % self._sizes(y)

    def other(self, y: Tensor) -> Tensor:
        """Draws values that are not those given (…, d), each of the others as likely."""
        if self.each is None:
            return self.shift(y, torch.randint(1, self.largest, y.shape, device=y.device))
        uniform = torch.rand(y.shape, dtype=torch.double, device=y.device)
        return self.shift(y, 1 + (uniform * (self._sizes(y) - 1)).long())

    def contains(self, y: Tensor) -> Tensor:
        """Says which of some values (…, d) are classes of their dimensions."""
        return (y >= 0) & (y < self._sizes(y))

    def _sizes(self, y: Tensor) -> Tensor | int:
        return self.largest if self.each is None else self.numbers[: y.shape[-1]].to(y.device)
