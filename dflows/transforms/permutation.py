"""Fixed permutations of the dimensions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dflows.classes import Classes
from dflows.errors import UserError
from dflows.representations import batch_shape
from dflows.transforms.transform import DiscreteTransform

__all__ = ["PermutationTransform"]


class PermutationTransform(DiscreteTransform):
    """Creates a fixed permutation of the dimensions: y_d = x_{order[d]}.

    A shorter event uses the entries of the order that it has.

    Args:
        order: A permutation of 0..D-1.

    Raises:
        UserError: If `order` is no permutation.

    Example:
        >>> transform = PermutationTransform([2, 0, 1])
        >>> y = transform(torch.tensor([5, 6, 7]))
        >>> y, transform.inv(y)
        (tensor([7, 5, 6]), tensor([5, 6, 7]))
    """

    takes_context = False
    order: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        if not order or sorted(order) != list(range(len(order))):
            raise UserError(
                f"order is {list(order)}, no permutation: name each of 0..{len(order) - 1} once"
            )
        self.register_buffer("order", torch.tensor(order))

    def extra_repr(self) -> str:
        return f"order={self.order.tolist()}"

    @property
    def passes(self) -> int:
        return 0

    def keeps(self, classes: Classes) -> bool:
        if classes.each is None:
            return True
        # Shorter events, too, whose order lacks the later dimensions.
        numbers = classes.numbers.to(self.order.device)
        cuts = (self.order[self.order < length] for length in range(1, len(numbers) + 1))
        return all(torch.equal(numbers[cut], numbers[: len(cut)]) for cut in cuts)

    def _permute(self, value: Tensor, inverse: bool) -> Tensor:
        dim = len(batch_shape(value))
        order = self.order
        if value.shape[dim] != len(order):
            order = order[order < value.shape[dim]]
        if len(order) != value.shape[dim]:
            raise UserError(
                f"the permutation orders {len(order)} dimensions, and there are {value.shape[dim]}"
            )
        return value.index_select(dim, order.argsort() if inverse else order)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._permute(x, inverse=False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        return self._permute(y, inverse=True)

    def supports_prefix(self, number: int, length: int) -> bool:
        order = [dimension for dimension in self.order.tolist() if dimension < length]
        return max(order[:number]) < number
