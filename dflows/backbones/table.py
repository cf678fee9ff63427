"""A table: one row of features for every state of the conditioning dimensions."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.arguments import check_positive
from dflows.backbones.backbone import Backbone
from dflows.errors import LengthError, UserError
from dflows.memory import check_memory
from dflows.orderings import Natural, Ordering
from dflows.representations import is_one_hot, to_indices

__all__ = ["Table"]

LARGEST = 10**7


def _layout(levels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Lays out the rows of all dimensions one after the other.

    Returns:
        Strides (D, D): by how much the row of d moves when e goes to its next class, 0 where d does
        not depend on e; and the first row (D,) of each dimension.
    """
    lower = levels < levels.unsqueeze(-1)
    powers = num_classes ** (lower.cumsum(dim=-1) - 1).clamp(min=0)
    states = num_classes ** lower.sum(dim=-1)
    return powers * lower, states.cumsum(dim=0) - states


class Table(Backbone):
    """Creates an exact backbone for tiny problems: a row of features for every state.

    Dimension d has a row for every joint state of the dimensions of lower level, K to the power of
    their number. Rows share nothing, so that only its structure limits what a flow can express.

    It takes the values themselves as content, indices (B, D) or one-hot vectors (B, D, K), and no
    query. The features are a multilinear function of the one-hot vectors; value and first
    derivatives are exact, and need only the rows that differ from the state in one dimension.

    Args:
        width: Features of one dimension.
        num_classes: K.
        length: D; the table takes no other.
        ordering: Which dimensions condition which, and so how many rows there are. Without one the
            table has as many as any ordering needs, and follows the levels of each call. A stack
            needs a table for every transform.
        conditioning: Without an ordering, the most dimensions that may condition one; all others by
            default. Bipartite flows need half of them, and so far fewer rows.

    Raises:
        UserError: If there would be more than ten million rows, a size is below 1, or an ordering
            is given together with `conditioning`.

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

    def __init__(
        self,
        width: int,
        num_classes: int,
        length: int,
        ordering: Ordering | None = None,
        conditioning: int | None = None,
    ) -> None:
        super().__init__(width, level_causal=True)
        check_positive(num_classes=num_classes, length=length)
        # Every dimension has a stride for every other.
        check_memory(8 * length**2, f"a Table with length {length:,}", "take another backbone")
        if conditioning is not None:
            check_positive(conditioning=conditioning)
            if ordering is not None:
                raise UserError(
                    f"a Table of conditioning={conditioning} was given {ordering!r}, which says "
                    "that itself: leave one of the two away"
                )
        self.num_classes = num_classes
        self.length = length
        self.ordering = ordering
        self.conditioning = conditioning
        # Distinct levels condition the most.
        levels = (ordering or Natural()).levels(length)
        lower = (levels < levels.unsqueeze(-1)).sum(dim=-1)
        if conditioning is not None:
            lower = lower.clamp(max=conditioning)
        # Of 64 digits there are too many states, and with more the numbers themselves grow.
        count = sum(num_classes ** min(int(number), 64) for number in lower)
        if count > LARGEST:
            raise UserError(
                f"a Table of length={length} and num_classes={num_classes} under {ordering!r} has "
                f"{count:,} rows, more than {LARGEST:,}: it is for tiny problems, take another "
                "backbone"
            )
        self.register_buffer("levels", levels, persistent=False)
        strides, offsets = _layout(levels, num_classes)
        self.register_buffer("strides", strides, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        self.rows = nn.Parameter(torch.randn(count, width) * width**-0.5)

    def extra_repr(self) -> str:
        bound = (
            f"ordering={self.ordering!r}"
            if self.conditioning is None
            else f"conditioning={self.conditioning}"
        )
        return f"width={self.width}, num_classes={self.num_classes}, length={self.length}, {bound}"

    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        self._check(content, levels)
        strides, offsets = self.strides, self.offsets
        if self.ordering is None and levels is not None:
            strides, offsets = _layout(levels, self.num_classes)
        states = to_indices(content)
        rows = offsets + (states.unsqueeze(1) * strides).sum(dim=-1)
        features = F.embedding(rows, self.rows)
        if content.requires_grad and torch.is_grad_enabled():
            features = features + self._derivative(content, states, rows, strides)
        return features

    def _derivative(self, content: Tensor, states: Tensor, rows: Tensor, strides: Tensor) -> Tensor:
        """Returns zeros (B, D, width) whose derivative by the one-hot vectors is the features'."""
        dimensions, lower = (strides > 0).nonzero(as_tuple=True)
        steps = strides[dimensions, lower]
        classes = torch.arange(self.num_classes, device=rows.device)
        steps = (classes - states[:, lower].unsqueeze(-1)) * steps.unsqueeze(-1)
        others = F.embedding(rows[:, dimensions].unsqueeze(-1) + steps, self.rows.detach())
        zeros = (content - content.detach())[:, lower]
        change = torch.einsum("bnk,bnkw->bnw", zeros, others.to(zeros.dtype))
        total = change.new_zeros(*states.shape, self.width)
        return total.index_add(1, dimensions, change).to(self.rows.dtype)

    def _check(self, content: Tensor, levels: Tensor | None) -> None:
        shape = (self.length, self.num_classes) if is_one_hot(content) else (self.length,)
        if content.shape[1:] != shape:
            shorter = content.ndim == len(shape) + 1 and content.shape[2:] == shape[1:]
            raise (LengthError if shorter else UserError)(
                f"a Table of length={self.length} and num_classes={self.num_classes} was given "
                f"values {tuple(content.shape)}: give indices (batch, length) or one-hot vectors "
                "(batch, length, num_classes), of its own length"
            )
        if levels is None or self.ordering is None:
            most = self.conditioning
            given = self.levels if levels is None else levels
            if most is not None and (given < given.unsqueeze(-1)).sum(dim=-1).max() > most:
                raise UserError(
                    f"a Table of conditioning={most} was given levels of which one has more below: "
                    f"{given.tolist()}: give a larger one, or none"
                )
            return
        if not torch.equal(levels, self.levels):
            raise UserError(
                f"a Table made for {self.ordering!r} was called with the levels {levels.tolist()}, "
                f"and its own are {self.levels.tolist()}: make one for each ordering, and give no "
                "context"
            )
