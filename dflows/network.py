"""A network over an ordering: from values to logits, in one evaluation.

:class:`dflows.conditioner.Conditioner` says which evaluations to make.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from dflows.acceleration import accelerated
from dflows.arguments import check_dimensions
from dflows.backbones import Backbone, as_backbone
from dflows.classes import Classes, NumClasses
from dflows.embedding import Context, Embedding, Layout, Layouts, behind
from dflows.errors import UserError
from dflows.experts import Expert
from dflows.heads import Head, HeadPerDimension
from dflows.orderings import Ordering
from dflows.representations import to_indices, without_autocast
from dflows.views import view

__all__ = ["OrderedNetwork", "method_of"]


def _evaluate(network: nn.Module, *inputs: Tensor | None) -> Tensor:
    features: Tensor = network(*inputs)
    return features


def method_of(network: nn.Module, name: str) -> Callable[..., Any]:
    """Returns a method of a backbone, compiled where that is wanted."""
    return partial(accelerated(getattr(type(network), name)), network)


def _check_size(network: "OrderedNetwork", length: int, num_levels: int) -> None:
    if num_levels > length:
        raise UserError(f"{num_levels} levels were asked for: give 1 to {length}, the dimensions")
    embedding, had = network.embedding, network.num_levels
    any_levels = network.backbone.knows_levels or network.any_order
    if num_levels != had and not any_levels:
        raise UserError(
            f"a {embedding.name} has an embedding for each of {had} levels, and {num_levels} were "
            "asked for: choose a backbone that knows levels by itself, an LSTM or a Transformer of "
            "positions='lanes' say"
        )
    if length != network.length and network.classes.each is not None:
        raise UserError(
            f"the {network.length} dimensions have classes of their own, and {length} were "
            "asked for: leave the length as it is"
        )
    if length != network.length and embedding.positions is not None:
        raise UserError(
            f"a {embedding.name} has an embedding for each of {network.length} dimensions, and "
            f"{length} were asked for: choose a backbone that knows positions by itself"
        )


class OrderedNetwork(nn.Module):
    """A backbone between embeddings and a head, over an ordering.

    Its arguments are those of :class:`dflows.conditioner.Conditioner`, which is made of it.
    """

    absent: Tensor | None

    def __init__(
        self,
        num_classes: NumClasses,
        length: int,
        ordering: Ordering,
        backbone: nn.Module,
        num_logits: int | None = None,
        context: Context | None = None,
        expert: Expert | None = None,
        *,
        any_order: bool = False,
    ) -> None:
        super().__init__()
        self.length = check_dimensions(length)
        self.classes = Classes(num_classes, length)
        self.num_classes = num_classes = self.classes.largest
        of_classes = num_logits is None
        num_logits = num_classes if num_logits is None else num_logits
        if expert is not None and any_order:
            raise UserError(
                "an expert knows one ordering, and any_order is true: leave one of the two away"
            )
        if expert is not None and self.classes.each is not None:
            raise UserError(
                "an expert was given where num_classes has a number for each dimension, and it is "
                "of the same classes everywhere: leave it away"
            )
        if expert is not None and not expert.num_classes == num_classes == num_logits:
            raise UserError(
                f"an expert of {expert.num_classes} classes was given where a value has "
                f"{num_classes} and {num_logits} logits: give an expert of as many classes, and "
                "logits of the classes themselves, as those of a base or a RankPermutation"
            )
        self.num_logits = num_logits
        self.ordering = ordering
        self.backbone: Backbone = as_backbone(backbone)
        levels = ordering.levels(length)
        self.num_levels = int(levels.max()) + 1
        self.embedding = Embedding(
            self.classes, self.num_levels, self.backbone, context, any_order=any_order
        )
        self._layouts = Layouts()
        width = self.backbone.width
        alike = self.classes.each is None
        self.head: Head | HeadPerDimension = (
            Head(width, num_logits) if alike else HeadPerDimension(length, width, num_logits)
        )
        # A bijection knows itself which logits it reads.
        absent = self.classes.absent if of_classes else None
        self.register_buffer("absent", absent, persistent=False)
        self.expert = expert
        if expert is not None:
            self.gate = Head(width, expert.num_terms(levels))
            nn.init.zeros_(self.gate.weight)
            nn.init.ones_(self.gate.bias)

    def extra_repr(self) -> str:
        execution = "level-causal" if self.one_pass else "masked"
        return f"ordering={self.ordering!r}, length={self.length}, {execution}"

    @torch.no_grad()
    def init_head(self, logits: Tensor) -> None:
        """Sets the logits of every dimension to these, whatever the values.

        Args:
            logits: Logits (num_logits,), or (D, num_logits) where dimensions have heads of their
                own.
        """
        self.head.weight.zero_()
        self.head.bias.copy_(logits)

    @property
    def width(self) -> int:
        """Features of one dimension."""
        return self.backbone.width

    @property
    def takes_context(self) -> bool:
        """Whether the logits depend on a context."""
        return self.embedding.context is not None

    @property
    def one_pass(self) -> bool:
        """Whether one evaluation of the backbone gives the logits of all dimensions."""
        return self.backbone.level_causal

    def layout(self, length: int, device: torch.device, tokens: int = 0) -> Layout:
        """Returns the layout of `length` dimensions behind so many context tokens."""
        return self._layouts.find(self.ordering, length, device, tokens)

    def resized(self, length: int | None = None, num_levels: int | None = None) -> Self:
        """Returns this network over another length or number of levels; all is shared.

        Raises:
            UserError: If the ordering cannot have so many levels, or the network has parameters for
                each level or dimension.
        """
        length = check_dimensions(self.length if length is None else length)
        ordering = self.ordering
        if num_levels not in (None, self.num_levels):
            ordering = ordering.with_levels(num_levels)
        count = int(ordering.levels(length).max()) + 1
        _check_size(self, length, count if num_levels is None else num_levels)
        classes = Classes(self.classes.given, length)
        return view(self, ordering=ordering, length=length, num_levels=count, classes=classes)

    @property
    def any_order(self) -> bool:
        """Whether one network serves all orderings."""
        return self.embedding.any_order

    def with_ordering(self, ordering: Ordering) -> Self:
        """Returns this network over another ordering; all is shared.

        Raises:
            UserError: If it serves one ordering alone.
        """
        if not self.any_order:
            raise UserError(
                f"a {self.embedding.name} was trained over {self.ordering!r} alone: train a flow "
                "of dflows.flows.any_order"
            )
        count = int(ordering.levels(self.length).max()) + 1
        return view(self, ordering=ordering, num_levels=count)

    def visible_logits(self, y: Tensor, visible: Tensor, context: Tensor | None = None) -> Tensor:
        """Computes the logits of all dimensions given those that are visible, in one evaluation.

        Args:
            y: Indices (N, d); those that are not visible do not matter.
            visible: Which of them are, (N, d).
            context: As in :meth:`features`.

        Returns:
            Logits (N, d, num_logits); those of visible dimensions are of no use.

        Raises:
            UserError: If it does not serve all orderings.
        """
        if not self.any_order:
            raise UserError(f"a {self.embedding.name} serves {self.ordering!r} alone")
        layout = self.layout(y.shape[1], y.device)
        content, count = self.embedding.visible(y, visible, layout, context)
        return self._logits(accelerated(_evaluate)(self.backbone, content)[:, count:], y)

    def supports_prefix(self, number: int, length: int) -> bool:
        """Returns whether the first `number` of `length` dimensions depend on no later ones."""
        levels = self.ordering.levels(length)
        return number >= length or bool(levels[:number].max() <= levels[number:].min())

    def _causal_inputs(
        self, length: int, device: torch.device, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the query and levels of what a level-causal backbone sees, and the tokens."""
        query, tokens = self.embedding.causal(self.layout(length, device), context)
        count = 0 if tokens is None else tokens.shape[1]
        return query, self.layout(length, device, count).shifted, tokens

    def features(
        self,
        y: Tensor,
        level: Tensor | None = None,
        context: Tensor | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Evaluates the backbone once.

        Args:
            y: Values (N, d) or (N, d, K).
            level: The level (N,) or (1,) to evaluate, with the values of this and of higher levels
                hidden; a level-causal backbone needs none.
            context: Vectors (N, C) or sequences (N, S, C); (N, D, C) where it is aligned.
            only: The n dimensions to evaluate; all d by default.

        Returns:
            Features (N, d, width) or (N, n, width).

        Raises:
            UserError: If the backbone returns another shape, or a context is missing or too many.
        """
        layout, embedding = self.layout(y.shape[1], y.device), self.embedding
        inputs: tuple[Tensor | None, ...]
        if not embedding.embeds:
            embedding.check_context(context)
            count, inputs = 0, (y, None, layout.levels)
        elif self.one_pass:
            query, levels, tokens = self._causal_inputs(y.shape[1], y.device, context)
            inputs = behind(tokens, embedding.content(y)), query, levels
            count = 0 if tokens is None else tokens.shape[1]
        elif level is None:
            raise RuntimeError("a backbone that is not level-causal runs masked")
        else:
            content, count = embedding.masked(y, layout, level, context)
            inputs = (content,)
        if only is None:
            features = accelerated(_evaluate)(self.backbone, *inputs)[:, count:]
        else:
            dimensions = only + count if count else only
            features = method_of(self.backbone, "features_at")(dimensions, *inputs)
        expected = (len(y), y.shape[1] if only is None else len(only), self.width)
        if features.shape != expected:
            raise UserError(
                f"a {self.embedding.name} returned features {tuple(features.shape)}, and not "
                f"{expected}: a backbone must keep (batch, length, width)"
            )
        return features

    def _logits(self, features: Tensor, y: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Computes logits of features; of all dimensions, of some (n,), or of those true (N, d)."""
        with without_autocast(features.device.type):
            if self.classes.each is not None:
                return self._own_logits(features, y.shape[1], chosen)
            logits: Tensor = self.head(features)
            if self.expert is None:
                return logits
            levels = self.layout(y.shape[1], y.device).levels
            with torch.no_grad():
                terms = self.expert(to_indices(y), levels, chosen, num_terms=self.gate.out_features)
            gate = self.gate(features)
            return logits + (gate.unsqueeze(-2) * terms.to(logits.dtype)).sum(dim=-1)

    def _own_logits(self, features: Tensor, length: int, chosen: Tensor | None) -> Tensor:
        """Computes logits where dimensions have classes of their own; no others have mass."""
        dimensions = torch.arange(length, device=features.device) if chosen is None else chosen
        logits: Tensor = self.head(features, dimensions)
        if self.absent is None:
            return logits
        return logits.masked_fill(self.absent[dimensions], -torch.inf)
