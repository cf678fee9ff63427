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
from typing import TypeAlias

import torch
from torch import Tensor

from dflows.backbones import State, StatefulBackbone, SteppedBackbone
from dflows.embedding import Context
from dflows.errors import UserError
from dflows.network import OrderedNetwork, method_of
from dflows.representations import full_precision, is_one_hot

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


class Conditioner(OrderedNetwork):
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
        any_order: Whether one network serves all orderings (:meth:`with_ordering`): it embeds no
            levels, and is to be trained over random orderings.

    Raises:
        UserError: If the parts do not fit each other.

    Example:
        >>> from dflows.backbones import LSTM
        >>> from dflows.orderings import Natural
        >>> conditioner = Conditioner(5, 8, Natural(), LSTM(width=16))
        >>> conditioner(torch.randint(5, (2, 8))).shape
        torch.Size([2, 8, 5])
    """

    @property
    def steps(self) -> bool:
        """Whether generation takes cached steps: for all levels, the work of one evaluation."""
        return isinstance(self.backbone, SteppedBackbone) and self.backbone.steps

    @property
    def left_to_right(self) -> bool:
        """Whether every dimension depends on all before it and nothing else, and all are alike."""
        natural = torch.arange(self.length)
        alike = not self.takes_context and self.classes.each is None
        return alike and torch.equal(self.ordering.levels(self.length), natural)

    @property
    def stateful(self) -> bool:
        """Whether windows can continue where others ended: :meth:`resume`."""
        stateful = isinstance(self.backbone, StatefulBackbone) and self.backbone.stateful
        return stateful and self.left_to_right and self.expert is None

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
        features, state = method_of(backbone, "resume")(content, query, levels, before, state)
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
        layers = method_of(self.backbone, "layer_features")(
            self.embedding.content(y), query, levels
        )
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
        features = self.features(y, hide, context)
        if self.classes.each is not None:  # heads of all dimensions are quicker than one a value
            return sampled, self._logits(features, y)[sampled]
        return sampled, self._logits(features[sampled], y, sampled)

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
