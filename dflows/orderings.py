"""Which dimensions condition which: a level for every dimension.

A dimension depends on the dimensions of lower levels and on nothing else. Level 0 depends on
nothing: a transform leaves it as it is, and a base samples it first. All levels distinct gives the
autoregressive flow, two levels the bipartite flow, and what lies between is generated in as many
passes as there are levels that need a network.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dflows.arguments import check_positive
from dflows.errors import UserError

__all__ = [
    "BehindContext",
    "Blocks",
    "Checkerboard",
    "CoarseToFine",
    "Halves",
    "Natural",
    "Ordering",
    "Parity",
    "Permutation",
    "Reversed",
    "Strided",
    "alike",
    "untransformed",
]


class Ordering(ABC):
    """A level 0, 1, 2, … for every dimension.

    Two orderings are equal if their `repr` is.
    """

    @abstractmethod
    def levels(self, length: int) -> Tensor:
        """Returns the levels (length,), 0..L-1 without a gap.

        Level 0 alone may be empty: :class:`BehindContext` leaves it to a context.

        A shorter length is an event of its own: the last window of a text, say.

        Raises:
            UserError: If the ordering is not defined for the length.
        """

    def with_levels(self, count: int) -> "Ordering":
        """Returns the ordering of the same kind that has so many levels.

        Raises:
            UserError: If there is none.
        """
        raise UserError(
            f"{self!r} cannot have another number of levels: train over Strided, which can"
        )

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ordering) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


def _without_gaps(levels: Tensor) -> Tensor:
    return levels.unique(return_inverse=True)[1]


def _check_first(first: int) -> None:
    if first not in (0, 1):
        raise UserError(f"first is {first}: give 0 or 1, the part that conditions the other")


class Natural(Ordering):
    """Creates the ordering from left to right.

    Example:
        >>> Natural().levels(4)
        tensor([0, 1, 2, 3])
    """

    def levels(self, length: int) -> Tensor:
        return torch.arange(length)


class Reversed(Ordering):
    """Creates the ordering from right to left.

    Example:
        >>> Reversed().levels(4)
        tensor([3, 2, 1, 0])
    """

    def levels(self, length: int) -> Tensor:
        return torch.arange(length).flip(0)


class Permutation(Ordering):
    """Creates an ordering of one dimension after the other, by a permutation.

    A shorter event keeps the order of its dimensions among themselves.

    Args:
        order: The dimensions, beginning with the one that depends on nothing.

    Raises:
        UserError: If `order` is not a permutation.

    Example:
        >>> Permutation([2, 0, 1]).levels(3)
        tensor([1, 2, 0])
    """

    def __init__(self, order: Sequence[int]) -> None:
        self.order = list(order)
        if not self.order or sorted(self.order) != list(range(len(self.order))):
            raise UserError(
                f"order is {self.order}, no permutation: name each of 0..{len(self.order) - 1} once"
            )

    def levels(self, length: int) -> Tensor:
        if length > len(self.order):
            raise UserError(
                f"the permutation orders {len(self.order)} dimensions, and there are {length}: "
                "give an order of that length"
            )
        return _without_gaps(torch.tensor(self.order).argsort()[:length])


class Parity(Ordering):
    """Creates the bipartite ordering of even and odd dimensions.

    Args:
        first: The parity of level 0: 0 or 1. A single dimension is always of level 0.

    Raises:
        UserError: If `first` is neither.

    Example:
        >>> Parity().levels(5), Parity(first=1).levels(5)
        (tensor([0, 1, 0, 1, 0]), tensor([1, 0, 1, 0, 1]))
    """

    def __init__(self, first: int = 0) -> None:
        _check_first(first)
        self.first = first

    def levels(self, length: int) -> Tensor:
        return _without_gaps((torch.arange(length) + self.first) % 2)


class Halves(Ordering):
    """Creates the bipartite ordering of the left and the right half.

    With an odd number of dimensions the left half has one fewer.

    Args:
        first: The half of level 0: 0 (left) or 1 (right).

    Raises:
        UserError: If `first` is neither.

    Example:
        >>> Halves().levels(5), Halves(first=1).levels(5)
        (tensor([0, 0, 1, 1, 1]), tensor([1, 1, 0, 0, 0]))
    """

    def __init__(self, first: int = 0) -> None:
        _check_first(first)
        self.first = first

    def levels(self, length: int) -> Tensor:
        right = (torch.arange(length) >= length // 2).long()
        return _without_gaps(1 - right if self.first else right)


class Blocks(Ordering):
    """Creates an ordering of contiguous blocks, one after the other from left to right.

    Args:
        size: Dimensions of a block; the last may have fewer.

    Raises:
        UserError: If the size is below 1.

    Example:
        >>> Blocks(size=2).levels(5)
        tensor([0, 0, 1, 1, 2])
    """

    def __init__(self, size: int) -> None:
        check_positive(size=size)
        self.size = size

    def levels(self, length: int) -> Tensor:
        return torch.arange(length) // self.size


class Strided(Ordering):
    """Creates an ordering of the dimensions as rows, generated column by column: lanes.

    Every dimension sees its left neighbours in the row, its lane, and what is known of the next
    one. The dimensions of one level lie `columns` apart and are hence nearly independent in text.
    The number of passes does not grow with the length.

    Args:
        columns: Number of columns, which are the levels.

    Raises:
        UserError: If `columns` is below 1.

    Example:
        >>> Strided(columns=3).levels(7)
        tensor([0, 1, 2, 0, 1, 2, 0])
    """

    def __init__(self, columns: int) -> None:
        check_positive(columns=columns)
        self.columns = columns

    def levels(self, length: int) -> Tensor:
        return torch.arange(length) % self.columns

    def with_levels(self, count: int) -> "Strided":
        return Strided(count)


class Checkerboard(Ordering):
    """Creates the bipartite ordering of the even and odd sites of a lattice, stored row by row.

    The neighbours of a site are all of the other level. If only neighbours interact, the sites of
    level 1 are hence independent given level 0. A periodic lattice needs even numbers of rows and
    columns for that.

    Args:
        columns: Sites of a row.
        first: The sites of level 0: 0 (row plus column even) or 1 (odd). A single dimension is
            always of level 0.

    Raises:
        UserError: If `columns` is below 1, or `first` is neither.

    Example:
        >>> Checkerboard(columns=4).levels(16).view(4, 4)
        tensor([[0, 1, 0, 1],
                [1, 0, 1, 0],
                [0, 1, 0, 1],
                [1, 0, 1, 0]])
    """

    def __init__(self, columns: int, first: int = 0) -> None:
        check_positive(columns=columns)
        _check_first(first)
        self.columns = columns
        self.first = first

    def levels(self, length: int) -> Tensor:
        dimensions = torch.arange(length)
        return _without_gaps(
            (dimensions // self.columns + dimensions % self.columns + self.first) % 2
        )


class CoarseToFine(Ordering):
    """Creates an ordering that halves the distance between known dimensions with every level.

    Args:
        stride: Distance of the dimensions of level 0, a power of 2.

    Raises:
        UserError: If the stride is no power of 2.

    Example:
        >>> CoarseToFine(stride=4).levels(9)
        tensor([0, 2, 1, 2, 0, 2, 1, 2, 0])
    """

    def __init__(self, stride: int) -> None:
        check_positive(stride=stride)
        if stride & (stride - 1):
            raise UserError(f"stride is {stride}: give a power of 2")
        self.stride = stride

    def levels(self, length: int) -> Tensor:
        dimensions = torch.arange(length)
        levels = torch.zeros_like(dimensions)
        distance, level = self.stride, 0
        while distance > 1:
            distance, level = distance // 2, level + 1
            levels[dimensions % (2 * distance) == distance] = level
        return _without_gaps(levels)


class BehindContext(Ordering):
    """Creates an ordering that leaves level 0 to a context: the levels of another, raised by one.

    A transform leaves dimensions of level 0 as they are. Behind a context it need leave none, since
    the first ones depend on the context. Around an ordering of one level this is the bipartite flow
    between a context and all dimensions, generated in one pass.

    Args:
        ordering: The ordering of the dimensions among themselves.

    Example:
        >>> BehindContext(Blocks(size=4)).levels(4), BehindContext(Reversed()).levels(4)
        (tensor([1, 1, 1, 1]), tensor([4, 3, 2, 1]))
    """

    def __init__(self, ordering: Ordering) -> None:
        self.ordering = ordering

    def levels(self, length: int) -> Tensor:
        return self.ordering.levels(length) + 1

    def with_levels(self, count: int) -> "BehindContext":
        return BehindContext(self.ordering.with_levels(count - 1))


def alike(orderings: Sequence[Ordering], length: int) -> Tensor:
    """Groups the dimensions that a stack treats alike: those of equal levels in every ordering.

    Args:
        orderings: The orderings of the stack; an empty stack treats all alike.
        length: D.

    Returns:
        The group (D,) of every dimension, 0..G-1.

    Example:
        >>> alike([Parity(), Halves()], length=4)
        tensor([0, 2, 1, 3])
    """
    if not orderings:
        return torch.zeros(length, dtype=torch.long)
    levels = torch.stack([ordering.levels(length) for ordering in orderings])
    return levels.unique(dim=1, return_inverse=True)[1]


def untransformed(orderings: Sequence[Ordering], length: int) -> Tensor:
    """Finds the dimensions that no transform of a stack changes.

    Args:
        orderings: The orderings of the stack; an empty stack changes nothing.
        length: D.

    Returns:
        Indices of the dimensions whose level is 0 in every ordering.

    Example:
        >>> untransformed([Parity(), Natural()], length=4)
        tensor([0])
        >>> untransformed([Parity(), Parity(first=1)], length=4)
        tensor([], dtype=torch.int64)
    """
    conditions_only = torch.ones(length, dtype=torch.bool)
    for ordering in orderings:
        conditions_only &= ordering.levels(length) == 0
    return conditions_only.nonzero().squeeze(-1)
