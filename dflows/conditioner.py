"""The conditional network: from values to logits, never looking at a level that it must not see.

A conditioner is an ordering and a backbone between an embedding of values and a linear head. It
gives transforms the parameters of their bijection, and autoregressive bases their probabilities. It
is the one place that knows how to run a backbone:

- *level-causal*: the backbone itself keeps to the ordering, and one evaluation gives the logits of
  every dimension;
- *masked*: a learned vector replaces the dimensions of the same and of higher levels before the
  backbone sees them, so any network will do; one evaluation a level.

A backbone says itself what else it can do (:class:`dflows.backbones.Backbone`).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dflows.acceleration import accelerated
from dflows.arguments import check_dimensions
from dflows.backbones import Backbone, State, StatefulBackbone, SteppedBackbone, as_backbone
from dflows.classes import Classes, NumClasses
from dflows.embedding import Context, Embedding, Layout, Layouts, behind
from dflows.errors import UserError
from dflows.experts import Expert
from dflows.heads import Head, HeadPerDimension
from dflows.orderings import Ordering
from dflows.representations import full_precision, is_one_hot, to_indices, without_autocast
from dflows.views import view

__all__ = ["Conditioner", "Context", "evaluated_by"]

LevelByLevel: TypeAlias = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
"""See :meth:`Conditioner.level_by_level`."""

Shortcut: TypeAlias = Callable[["Conditioner", Tensor, int], Tensor | None]
"""Finds the logits of values and a first level (:meth:`Conditioner.forward`) faster, or returns
None."""

_shortcut: ContextVar[Shortcut | None] = ContextVar("shortcut", default=None)


@contextmanager
def evaluated_by(shortcut: Shortcut) -> Iterator[None]:
    """Asks a shortcut first for logits without a context.

    Args:
        shortcut: Finds the same logits faster, or returns None.
    """
    token = _shortcut.set(shortcut)
    try:
        yield
    finally:
        _shortcut.reset(token)


def _evaluate(network: nn.Module, *inputs: Tensor | None) -> Tensor:
    features: Tensor = network(*inputs)
    return features


def _method(network: nn.Module, name: str) -> Callable[..., Any]:
    """Returns a method of a backbone, compiled where that is wanted."""
    return partial(accelerated(getattr(type(network), name)), network)


def _check_size(conditioner: "Conditioner", length: int, num_levels: int) -> None:
    if num_levels > length:
        raise UserError(f"{num_levels} levels were asked for: give 1 to {length}, the dimensions")
    embedding, had = conditioner.embedding, conditioner.num_levels
    if num_levels != had and not conditioner.backbone.knows_levels:
        raise UserError(
            f"a {embedding.name} has an embedding for each of {had} levels, and {num_levels} were "
            "asked for: choose a backbone that knows levels by itself, an LSTM or a Transformer of "
            "positions='lanes' say"
        )
    if length != conditioner.length and conditioner.classes.each is not None:
        raise UserError(
            f"the {conditioner.length} dimensions have classes of their own, and {length} were "
            "asked for: leave the length as it is"
        )
    if length != conditioner.length and embedding.positions is not None:
        raise UserError(
            f"a {embedding.name} has an embedding for each of {conditioner.length} dimensions, and "
            f"{length} were asked for: choose a backbone that knows positions by itself"
        )


class Conditioner(nn.Module):
    """Creates a network from values (N, d) to logits (N, d, num_logits) that respects an ordering.

    The logits of a dimension depend on the values of lower levels only, and on the context.

    Args:
        num_classes: K, the classes of a value; or one number a dimension, each of which then has
            embeddings and a head of its own.
        length: D, the largest number of dimensions.
        ordering: Which dimensions condition which.
        backbone: The network, from features (N, D, width) to features (N, D, width). Conditioners
            may share one: their embeddings and heads are their own.
        num_logits: Logits of one dimension, such as those of a bijection; K by default.
        context: What else it is conditioned on.
        expert: Adds its terms to the logits, each times a gate that the network computes, 1 at
            first. The network learns what the expert does not know.

    Raises:
        UserError: If the parts do not fit each other.

    Example:
        >>> from dflows.backbones import LSTM
        >>> from dflows.orderings import Natural
        >>> conditioner = Conditioner(5, 8, Natural(), LSTM(width=16))
        >>> conditioner(torch.randint(5, (2, 8))).shape
        torch.Size([2, 8, 5])
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
    ) -> None:
        super().__init__()
        self.length = check_dimensions(length)
        self.classes = Classes(num_classes, length)
        self.num_classes = num_classes = self.classes.largest
        num_logits = num_classes if num_logits is None else num_logits
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
        self.embedding = Embedding(self.classes, self.num_levels, self.backbone, context)
        self._layouts = Layouts()
        width = self.backbone.width
        alike = self.classes.each is None
        self.head: Head | HeadPerDimension = (
            Head(width, num_logits) if alike else HeadPerDimension(length, width, num_logits)
        )
        # Of other logits than those of classes, a bijection knows itself which ones it reads.
        absent = self.classes.absent if num_logits == num_classes else None
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

    @property
    def steps(self) -> bool:
        """Whether generation takes cached steps: for all levels, the work of one evaluation."""
        return isinstance(self.backbone, SteppedBackbone) and self.backbone.steps

    @property
    def left_to_right(self) -> bool:
        """Whether every dimension depends on all before it, and there is no context."""
        natural = torch.arange(self.length)
        return not self.takes_context and torch.equal(self.ordering.levels(self.length), natural)

    @property
    def stateful(self) -> bool:
        """Whether windows can continue where others ended: :meth:`resume`."""
        stateful = isinstance(self.backbone, StatefulBackbone) and self.backbone.stateful
        alike = self.expert is None and self.classes.each is None
        return stateful and self.left_to_right and alike

    def layout(self, length: int, device: torch.device, tokens: int = 0) -> Layout:
        """Returns the layout of `length` dimensions behind so many context tokens."""
        return self._layouts.find(self.ordering, length, device, tokens)

    def resized(self, length: int | None = None, num_levels: int | None = None) -> "Conditioner":
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
        classes = Classes(self.classes.each or self.num_classes, length)
        return view(self, ordering=ordering, length=length, num_levels=count, classes=classes)

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
            features = _method(self.backbone, "features_at")(dimensions, *inputs)
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
        dimensions = chosen
        if chosen is None:
            dimensions = torch.arange(length, device=features.device)
        elif chosen.ndim == 2:
            dimensions = chosen.nonzero()[:, 1]
        logits: Tensor = self.head(features, dimensions)
        if self.absent is None:
            return logits
        return logits.masked_fill(self.absent[dimensions], -torch.inf)

    def forward(self, y: Tensor, context: Tensor | None = None, *, first_level: int = 0) -> Tensor:
        """Computes the logits of all dimensions.

        Args:
            y: Indices (N, d) or one-hot vectors (N, d, K).
            context: As in :meth:`features`.
            first_level: The lowest level to evaluate.

        Returns:
            Logits (N, d, num_logits); zeros at levels below the first.
        """
        shortcut = _shortcut.get()
        if shortcut is not None and context is None:
            found = shortcut(self, y, first_level)
            if found is not None:
                return found
        members = self.layout(y.shape[1], y.device).members
        if self.one_pass:
            logits = self._logits(self.features(y, None, context), y)
            below = members[:first_level]
            return logits.index_fill(1, torch.cat(below), 0) if below else logits
        logits = full_precision(self.head.weight).new_zeros(*y.shape[:2], self.num_logits)
        needed = range(first_level, len(members))
        if not needed:
            return logits
        parts = [self.level_logits(y, level, context) for level in needed]
        return logits.index_copy(1, torch.cat(members[first_level:]), torch.cat(parts, 1))

    def resume(self, y: Tensor, last: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Computes the logits of windows that continue where others ended.

        Args:
            y: Indices (N, d).
            last: The value (N,) before each window; -1 where a text starts, from a state of 0.
            state: The backbone's state before the windows; zeros by default.

        Returns:
            Logits (N, d, num_logits), and the state after the windows.

        Raises:
            UserError: If the backbone has no state, or does not read from left to right.
        """
        backbone = self.backbone
        if not isinstance(backbone, StatefulBackbone) or not self.stateful:
            raise UserError(
                f"a {self.embedding.name} over {self.ordering!r} carries no state from window to "
                "window: choose an LSTM over Natural, without a context or an expert"
            )
        query, levels, _ = self._causal_inputs(y.shape[1], y.device, None)
        starts = (last < 0).unsqueeze(-1)
        before = torch.where(starts, backbone.start, self.embedding.content(last.clamp(min=0)))
        if state is not None:
            state = tuple(part.masked_fill(starts, 0) for part in state)
        content = self.embedding.content(y)
        features, state = _method(backbone, "resume")(content, query, levels, before, state)
        return self._logits(features, y), state

    def layer_logits(self, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Computes the logits of all dimensions, and the features of every layer.

        Args:
            y: Indices (N, d).

        Returns:
            Logits (N, d, num_logits), and the features (N, d, width) of every layer that the
            backbone reports; the logits are computed from the last.

        Raises:
            UserError: If the backbone does not run in one pass, or takes a context.
        """
        if not self.one_pass or not self.embedding.embeds:
            raise UserError(
                f"a {self.embedding.name} does not give the features of all dimensions in one "
                "pass: choose a level-causal backbone"
            )
        query, levels, _ = self._causal_inputs(y.shape[1], y.device, None)
        layers = _method(self.backbone, "layer_features")(self.embedding.content(y), query, levels)
        return self._logits(layers[-1], y), layers

    def level_logits(self, y: Tensor, level: int, context: Tensor | None = None) -> Tensor:
        """Computes the logits (N, n, num_logits) of the n dimensions of one level.

        Only the values of lower levels matter.
        """
        only = self.layout(y.shape[1], y.device).members[level]
        return self._logits(self._at(y, level, context, only), y, only)

    def _at(self, y: Tensor, level: int, context: Tensor | None, only: Tensor) -> Tensor:
        """Computes the features (N, n, width) of dimensions of one level, in one evaluation."""
        hide = None if self.one_pass else torch.full((1,), level, device=y.device)
        return self.features(y, hide, context, only)

    def sampled_level_logits(
        self, y: Tensor, level: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes the logits of one level for every example, in one evaluation.

        Args:
            y: Indices (N, d).
            level: The level (N,) of every example.
            context: As in :meth:`features`.

        Returns:
            The dimensions of these levels, boolean (N, d) with M true entries, and their logits
            (M, num_logits).
        """
        sampled = self.layout(y.shape[1], y.device).levels == level.unsqueeze(-1)
        hide = None if self.one_pass else level
        return sampled, self._logits(self.features(y, hide, context)[sampled], y, sampled)

    def level_by_level(self, y: Tensor, context: Tensor | None = None) -> LevelByLevel:
        """Starts an evaluation level by level.

        It takes cached steps where the backbone has them and gradients are off.

        Args:
            y: Indices (N, d) or one-hot vectors (N, d, K); their values do not matter yet.
            context: As in :meth:`features`.

        Returns:
            A function to call once a level, in order, from level 0 or 1: with the values so far,
            the level, and the length of a prefix. It returns the dimensions (n,) of the level
            behind the prefix, and their logits (N, n, num_logits).
        """
        backbone, layout = self.backbone, self.layout(y.shape[1], y.device)
        if (
            not isinstance(backbone, SteppedBackbone)
            or not self.steps
            or is_one_hot(y)
            or torch.is_grad_enabled()
        ):

            def whole(y: Tensor, level: int, prefix_length: int) -> tuple[Tensor, Tensor]:
                unknown = layout.members[level][bisect_left(layout.placed[level], prefix_length) :]
                if not len(unknown):
                    return unknown, self.head.weight.new_empty(len(y), 0, self.num_logits)
                return unknown, self._logits(self._at(y, level, context, unknown), y, unknown)

            return whole
        query, levels, tokens = self._causal_inputs(y.shape[1], y.device, context)
        cache = backbone.begin(query, levels, y.shape[0])
        first = backbone.advance(cache, 0, tokens)

        def step(y: Tensor, level: int, prefix_length: int) -> tuple[Tensor, Tensor]:
            features = first
            if level > layout.lowest:
                before = layout.members[level - 1]
                content = self.embedding.content(y[:, before], before)
                features = backbone.advance(cache, level - layout.lowest, content)
            known = bisect_left(layout.placed[level], prefix_length)
            unknown = layout.members[level][known:]
            return unknown, self._logits(features[:, known:], y, unknown)

        return step
