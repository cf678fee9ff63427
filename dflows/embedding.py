"""The input of a backbone: embeddings of values, levels, positions and the context."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.backbones import Backbone
from dflows.classes import Classes
from dflows.errors import UserError
from dflows.orderings import Ordering
from dflows.representations import is_one_hot

__all__ = ["Context", "Embedding", "Layout", "Layouts"]


@dataclass(frozen=True)
class Context:
    """Creates the description of what a flow is conditioned on.

    Args:
        features: C, the features of an encoded context, a vector (B, C) or a sequence (B, S, C).
        aligned: Whether position d of a sequence belongs to dimension d, and is added to its query.
            Otherwise a context of any length stands in front, as tokens visible to all.
        encoder: Maps contexts to such vectors or sequences; without one, contexts must already be
            encoded.

    Raises:
        UserError: If there are no features.
    """

    features: int
    aligned: bool = False
    encoder: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.features < 1:
            raise UserError(f"features is {self.features}: give a context at least 1 feature")


class Layout(NamedTuple):
    """The levels (d,) of an event, and the dimensions of each level.

    `members` are tensors, and `placed` the same as lists of numbers. A backbone expects no empty
    level 0, so it gets the levels `shifted` by the `lowest`, behind the -1 of context tokens. It is
    computed on the CPU, so that nothing waits for the device.
    """

    levels: Tensor
    members: list[Tensor]
    placed: list[list[int]]
    lowest: int
    shifted: Tensor

    @classmethod
    def of(cls, levels: Tensor, device: torch.device, tokens: int = 0) -> Self:
        """Computes the layout of levels (d,) behind so many context tokens."""
        with torch.inference_mode(False):
            levels = levels.clone()
            members = [
                (levels == level).nonzero().squeeze(-1) for level in range(int(levels.max()) + 1)
            ]
            lowest = int(levels.min())
            shifted = torch.cat([levels.new_full((tokens,), -1), levels - lowest])
            return cls(
                levels.to(device),
                [numbers.to(device) for numbers in members],
                [numbers.tolist() for numbers in members],
                lowest,
                shifted.to(device),
            )


class Layouts:
    """Creates a cache of layouts, which copies of its owner do not take along."""

    def __init__(self) -> None:
        self._known: dict[tuple[Ordering, int, torch.device, int], Layout] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Layouts":
        return Layouts()

    def find(
        self, ordering: Ordering, length: int, device: torch.device, tokens: int = 0
    ) -> Layout:
        """Returns the layout of `length` dimensions behind so many context tokens."""
        key = (ordering, length, device, tokens)
        if key not in self._known:
            self._known[key] = Layout.of(ordering.levels(length), device, tokens)
        return self._known[key]


class Embedding(nn.Module):
    """Creates the embeddings of values, levels, positions and context that a backbone reads.

    Args:
        classes: The classes of D dimensions. Where they differ, a dimension has embeddings of its
            own.
        num_levels: Levels of the ordering.
        backbone: The backbone, which says what input it needs.
        context: What else it is conditioned on.
        any_order: Whether it embeds no levels, so that one network serves all orderings.

    Raises:
        UserError: If the backbone takes no context, or keeps to an ordering by itself where it is
            to serve all.
    """

    offsets: Tensor | None
    current: nn.Parameter | None

    def __init__(
        self,
        classes: Classes,
        num_levels: int,
        backbone: Backbone,
        context: Context | None = None,
        *,
        any_order: bool = False,
    ) -> None:
        super().__init__()
        if any_order and backbone.level_causal:
            raise UserError(
                f"a {backbone.display_name} keeps to one ordering by itself: choose a backbone "
                "that sees all dimensions, a Transformer of attention='full' say"
            )
        self.any_order = any_order
        self.length = length = classes.length
        self.width = width = backbone.width
        self.name = backbone.display_name
        self.aligned = context is not None and context.aligned
        self.embeds = backbone.embeds
        if not self.embeds:
            if context is not None:
                raise UserError(
                    f"{self.name} has a row for every state of the dimensions and none for a "
                    "context: choose another backbone"
                )
            self.register_module("context", None)
            self.register_parameter("query", None)
            self.register_parameter("positions", None)
            return
        offsets = None if classes.each is None else classes.numbers.cumsum(0) - classes.numbers
        self.register_buffer("offsets", offsets, persistent=False)
        self.num_classes = classes.largest
        self.values = nn.Parameter(torch.randn(sum(classes.each or (classes.largest,)), width))
        if backbone.knows_levels or any_order:
            self.register_parameter("query", None)
        else:
            self.query = nn.Parameter(torch.randn(num_levels, width) * 0.1)
        if backbone.knows_positions:
            self.register_parameter("positions", None)
        else:
            self.positions = nn.Parameter(torch.randn(length, width) * 0.1)
        if backbone.level_causal:
            self.register_parameter("hidden", None)
            self.register_parameter("current", None)
        else:
            self.hidden = nn.Parameter(torch.randn(width))
            levels = None if any_order else nn.Parameter(torch.randn(num_levels, width) * 0.1)
            self.register_parameter("current", levels)
        self.context = None if context is None else nn.Linear(context.features, width)

    def content(self, y: Tensor, dimensions: Tensor | None = None) -> Tensor:
        """Embeds values.

        Args:
            y: Indices (N, d) or one-hot vectors (N, d, K).
            dimensions: The dimensions (d,) that they are of; the first d by default.

        Returns:
            Content (N, d, width).
        """
        if not self.embeds:
            return y
        if self.offsets is None:
            if is_one_hot(y):
                return y.to(self.values.dtype) @ self.values
            return F.embedding(y, self.values)
        offsets = self.offsets[: y.shape[1]] if dimensions is None else self.offsets[dimensions]
        if not is_one_hot(y):
            return F.embedding(y + offsets, self.values)
        # Rows of classes that a dimension has not are some other's, times 0.
        rows = offsets.unsqueeze(-1) + torch.arange(self.num_classes, device=y.device)
        rows = rows.clamp(max=len(self.values) - 1)
        return torch.einsum("ndk,dkw->ndw", y.to(self.values.dtype), self.values[rows])

    def check_context(self, context: Tensor | None) -> None:
        """Refuses a missing or unexpected context.

        Raises:
            UserError: If the context is missing or unexpected.
        """
        if (context is None) == (self.context is None):
            return
        if context is None:
            raise UserError("the flow is conditional, and no context was given: call it with one")
        remedy = "give the conditioner a Context" if self.embeds else "choose another backbone"
        raise UserError(f"a context was given to a {self.name} that takes none: {remedy}")

    def causal(self, layout: Layout, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Computes the query of a level-causal backbone.

        Args:
            layout: The dimensions.
            context: Vectors (N, C) or sequences (N, S, C); (N, D, C) where it is aligned.

        Returns:
            The query (S + d, width), or (N, d, width) where a context is aligned; and the tokens
            (N, S, width) of a context in front.
        """
        query, tokens = self._known(layout.levels, context)
        if tokens is not None:
            query = torch.cat([query.new_zeros(tokens.shape[1], self.width), query])
        return query, tokens

    def masked(
        self, y: Tensor, layout: Layout, level: Tensor, context: Tensor | None
    ) -> tuple[Tensor, int]:
        """Computes the features (N, S + d, width) of the values below a level, and S.

        Args:
            y: Indices (N, d) or one-hot vectors (N, d, K).
            layout: The dimensions.
            level: The lowest hidden level (N,) or (1,).
            context: As in :meth:`causal`.
        """
        visible = layout.levels < level.unsqueeze(-1)
        current = None if self.current is None else self.current[level].unsqueeze(1)
        return self.visible(y, visible, layout, context, current)

    def visible(
        self,
        y: Tensor,
        visible: Tensor,
        layout: Layout,
        context: Tensor | None,
        current: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Computes the features (N, S + d, width) of the values that are visible, and S.

        Args:
            y: Indices (N, d) or one-hot vectors (N, d, K).
            visible: Which of them are, (N, d) or (1, d).
            layout: The dimensions.
            context: As in :meth:`causal`.
            current: What all dimensions of an example are told, (N, 1, width) or (1, 1, width).
        """
        content = self.content(y)
        query, tokens = self._known(layout.levels, context)
        content = torch.where(visible.unsqueeze(-1), content, self.hidden.to(content.dtype))
        known = query if current is None else query + current
        return behind(tokens, content + known), 0 if tokens is None else tokens.shape[1]

    def _known(self, levels: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        query = self.values.new_zeros(len(levels), self.width)
        if self.query is not None:
            query = self.query[levels]
        if self.positions is not None:
            query = query + self.positions[: len(levels)]
        self.check_context(context)
        if context is None or self.context is None:
            return query, None
        if context.shape[-1] != self.context.in_features:
            raise UserError(
                f"a context {tuple(context.shape)} has {context.shape[-1]} features, and the "
                f"conditioner expects {self.context.in_features}: make the two the same"
            )
        vectors: Tensor = self.context(context.to(self.context.weight.dtype))
        if not self.aligned:
            return query, vectors.unsqueeze(1) if vectors.ndim == 2 else vectors
        if context.ndim != 3 or context.shape[1] not in (len(levels), self.length):
            raise UserError(
                f"a context {tuple(context.shape)} does not align with {len(levels)} dimensions: "
                "give a vector for each, (batch, length, features), or unset `aligned`"
            )
        return query + vectors[:, : len(levels)], None


def behind(tokens: Tensor | None, content: Tensor) -> Tensor:
    """Puts context tokens (N, S, width), if any, in front of content (N, d, width)."""
    return content if tokens is None else torch.cat([tokens.to(content.dtype), content], dim=1)
