"""A table: one row of features for every state of the conditioning dimensions."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.backbones.backbone import Backbone, check_positive
from dflows.errors import UserError
from dflows.orderings import Ordering
from dflows.representations import is_one_hot, to_indices

__all__ = ["Table"]

LARGEST = 10**7


class Table(Backbone):
    """Creates an exact conditioner for tiny problems: a row of features for every state.

    Dimension d has a row for every joint state of the dimensions of lower level, K to the power of
    their number. Nothing is shared between rows, so that nothing stands between a flow and what its
    structure can express.

    It takes the values themselves as content, indices (B, D) or one-hot vectors (B, D, K), and no
    query. Of the features as a multilinear function of the one-hot vectors it gives the value and
    the first derivatives, which needs only the rows that differ from the state in one dimension.

    Arguments:
        width: Features of one dimension.
        num_classes: K.
        length: D; the table takes no other.
        ordering: Which dimensions condition which. A stack has a table for every flow.

    Raises:
        UserError: If there would be more than ten million rows, or a size is below 1.

    Example:
        >>> from dflows.orderings import Natural
        >>> table = Table(width=8, num_classes=3, length=4, ordering=Natural())
        >>> table.rows.shape  # 1 + 3 + 9 + 27 states
        torch.Size([40, 8])
        >>> y = torch.tensor([[0, 2, 1, 1]])
        >>> table(y, levels=Natural().levels(4)).shape
        torch.Size([1, 4, 8])
    """

    embeds: ClassVar[bool] = False
    levels: Tensor
    strides: Tensor
    offsets: Tensor

    def __init__(self, width: int, num_classes: int, length: int, ordering: Ordering) -> None:
        super().__init__(width, level_causal=True)
        check_positive(num_classes=num_classes, length=length)
        self.num_classes = num_classes
        self.length = length
        self.ordering = ordering
        levels = ordering.levels(length)
        lower = levels < levels.unsqueeze(-1)
        states = [num_classes**count for count in lower.sum(dim=-1).tolist()]
        if sum(states) > LARGEST:
            raise UserError(
                f"a Table of length={length} and num_classes={num_classes} under {ordering!r} has "
                f"{sum(states):,} rows, more than {LARGEST:,}: it is for tiny problems, take "
                "another backbone"
            )
        # Entry (d, e): by how much the row of d moves when e goes to its next class.
        powers = num_classes ** (lower.cumsum(dim=-1) - 1).clamp(min=0)
        offsets = torch.tensor([0, *states]).cumsum(dim=0)[:-1]
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("strides", powers * lower, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        self.rows = nn.Parameter(torch.randn(sum(states), width) * width**-0.5)

    def extra_repr(self) -> str:
        return (
            f"width={self.width}, num_classes={self.num_classes}, length={self.length}, "
            f"ordering={self.ordering!r}"
        )

    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        self._check(content, levels)
        states = to_indices(content)
        rows = self.offsets + (states.unsqueeze(1) * self.strides).sum(dim=-1)
        features = F.embedding(rows, self.rows)
        if content.requires_grad and torch.is_grad_enabled():
            features = features + self._derivative(content, states, rows)
        return features

    def _derivative(self, content: Tensor, states: Tensor, rows: Tensor) -> Tensor:
        """Returns zeros (B, D, width) whose derivative by the one-hot vectors is the features'."""
        dimensions, lower = (self.strides > 0).nonzero(as_tuple=True)
        strides = self.strides[dimensions, lower]
        classes = torch.arange(self.num_classes, device=rows.device)
        steps = (classes - states[:, lower].unsqueeze(-1)) * strides.unsqueeze(-1)
        others = F.embedding(rows[:, dimensions].unsqueeze(-1) + steps, self.rows.detach())
        zeros = (content - content.detach())[:, lower]
        change = torch.einsum("bnk,bnkw->bnw", zeros, others.to(zeros.dtype))
        total = change.new_zeros(*states.shape, self.width)
        return total.index_add(1, dimensions, change).to(self.rows.dtype)

    def _check(self, content: Tensor, levels: Tensor | None) -> None:
        shape = (self.length, self.num_classes) if is_one_hot(content) else (self.length,)
        if content.shape[1:] != shape:
            raise UserError(
                f"a Table of length={self.length} and num_classes={self.num_classes} was given "
                f"values {tuple(content.shape)}: give indices (batch, length) or one-hot vectors "
                "(batch, length, num_classes), of its own length"
            )
        if levels is not None and not torch.equal(levels, self.levels):
            raise UserError(
                f"a Table made for {self.ordering!r} was called with the levels {levels.tolist()}, "
                f"and its own are {self.levels.tolist()}: make one for each ordering, and give no "
                "context"
            )
