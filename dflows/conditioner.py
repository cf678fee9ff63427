"""The conditional network: from the dimensions of lower levels to logits.

A conditioner holds an ordering, an embedding of values, a backbone and a linear head. Transforms
read the parameters of their bijection off it, autoregressive bases their probabilities. It is the
one place that knows how a backbone is run:

- *level-causal*: the backbone itself keeps to the ordering, and one evaluation gives the logits of
  every dimension;
- *masked*: the dimensions of the same and of higher levels are replaced by a learned vector before
  the backbone sees them, so that any network will do; one evaluation a level.

For a network that can do both, the two give equal logits.

A context is either set in front of the dimensions, as tokens that all of them see, or *aligned*:
its vector at position d is added to what is known of dimension d beforehand.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.acceleration import accelerated
from dflows.backbones import LSTM, Backbone, SteppedBackbone, Transformer
from dflows.errors import UserError
from dflows.lookahead import MOST_CLASSES, Ahead
from dflows.ngrams import NGrams
from dflows.orderings import Ordering
from dflows.representations import is_one_hot, to_indices

__all__ = ["Conditioner", "Decide", "Execution"]

Execution = Literal["auto", "causal", "masked"]

Decide: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Decides the values of some dimensions: from their numbers (n,) and logits (N, n, num_outputs)
to indices (N, n) or one-hot vectors (N, n, K)."""


def _width(backbone: nn.Module, width: int | None) -> int:
    if isinstance(backbone, Backbone):
        if width not in (None, backbone.width):
            raise UserError(
                f"width is {width} and the backbone's own is {backbone.width}: leave `width` away"
            )
        return backbone.width
    if width is None:
        raise UserError(
            f"the width of a {type(backbone).__name__} is not known: give `width`, the last "
            "dimension of the features that it takes and returns"
        )
    return width


def _evaluate(network: nn.Module, *inputs: Tensor) -> Tensor:
    features: Tensor = network(*inputs)
    return features


class _Dimensions(NamedTuple):
    """What an ordering makes of so many dimensions.

    `levels` (d,) and the `members` of every level, `placed` the same as numbers. A backbone knows
    no empty level 0, and is handed the levels `shifted` by the `lowest`, behind the -1 of context
    tokens. `runs` (d,) counts the dimensions right before each that are all of lower levels, as far
    as n-grams use them, and `ahead` is what is known behind it. All is worked out before it goes to
    a device, which nothing then waits for.
    """

    levels: Tensor
    members: list[Tensor]
    placed: list[list[int]]
    lowest: int
    shifted: Tensor
    runs: Tensor
    ahead: Ahead

    def unknown(self, level: int, known: int) -> tuple[Tensor, int]:
        """Returns the dimensions of a level from number `known` on, and how many come before."""
        before = bisect_left(self.placed[level], known)
        return self.members[level][before:], before


def _runs(levels: Tensor, most: int) -> Tensor:
    """Counts the dimensions (d,) right before each that are all of lower levels, up to so many."""
    runs, lower = torch.zeros_like(levels), torch.ones_like(levels, dtype=torch.bool)
    for back in range(1, min(most + 1, len(levels))):
        lower = lower & (levels.roll(back) < levels)
        lower[:back] = False
        runs += lower
    return runs


class Conditioner(nn.Module):
    """Creates a network from values (N, d) to logits (N, d, num_outputs) that keeps to an ordering.

    The logits of a dimension depend on the values of lower levels only, and on the context.

    Arguments:
        num_classes: K, the classes of a value.
        length: D, the largest number of dimensions.
        num_outputs: Logits of one dimension.
        ordering: Which dimensions condition which.
        backbone: The network, from features (N, D, width) to features (N, D, width).
        width: Features of one dimension; needed where the backbone does not tell its own.
        execution: ``causal``, ``masked``, or ``auto`` for the first of them that the backbone can.
        positions: Whether to add a learned embedding of positions. By default only to a backbone
            that is not of dflows', for those know positions by themselves.
        context_features: Features C of a context; without them there is none.
        align_context: Whether position d of a context (N, D, C) belongs to dimension d, to whose
            query it is added. Otherwise a context of any length is set in front, as tokens.
        conditions_first: Whether level 0 needs the network too, as in a base.
        grams: Counted n-grams of the values. Their log-probabilities, after the values of lower
            levels that stand right before a dimension, are added to its logits, times a factor
            that the network gives, 1 at first; and so are, of at most 64 classes, the
            log-likelihoods of what is known ahead of it, by trigrams
            (:func:`dflows.lookahead.lookahead`). The network learns what they do not know.

    Raises:
        UserError: If the backbone cannot be run as asked, or its width is unknown or another; or
            logits are not those of the classes that n-grams are of.
    """

    def __init__(
        self,
        num_classes: int,
        length: int,
        num_outputs: int,
        ordering: Ordering,
        backbone: nn.Module,
        *,
        width: int | None = None,
        execution: Execution = "auto",
        positions: bool | None = None,
        context_features: int | None = None,
        align_context: bool = False,
        conditions_first: bool = False,
        grams: NGrams | None = None,
    ) -> None:
        super().__init__()
        if grams is not None and not grams.num_classes == num_classes == num_outputs:
            raise UserError(
                f"n-grams of {grams.num_classes} classes were given where a value has "
                f"{num_classes} and {num_outputs} logits: give n-grams of as many classes, and "
                "logits of the classes themselves, as those of a base or a RankPermutation"
            )
        own = isinstance(backbone, Backbone)
        width = _width(backbone, width)
        causal = isinstance(backbone, Backbone) and backbone.level_causal
        if execution == "causal" and not causal:
            raise UserError(
                f"{type(backbone).__name__} is not level-causal, so it would see what it must "
                "predict: set execution to 'masked'"
            )
        self.num_classes = num_classes
        self.length = length
        self.num_outputs = num_outputs
        self.ordering = ordering
        self.width = width
        self.level_causal = causal
        self.one_pass = causal and execution != "masked"
        self.first_level = 0 if conditions_first else 1
        self.backbone = backbone
        self.align_context = align_context
        self._dimensions: dict[tuple[int, torch.device, int], _Dimensions] = {}

        levels = ordering.levels(length)
        num_levels = self.num_levels = int(levels.max()) + 1
        if conditions_first and int(levels.min()):
            raise UserError(
                f"{ordering!r} has no dimension of level 0, and a base begins there, with a "
                "context or without one: give it the ordering inside"
            )
        if num_levels <= self.first_level:
            raise UserError(
                f"{ordering!r} gives all {length} dimensions the same level, which leaves a flow "
                "nothing to do: choose an ordering of two levels or more, or a greater length"
            )
        self.embeds = not isinstance(backbone, Backbone) or backbone.embeds
        if self.embeds:
            self.embedding = nn.Parameter(torch.randn(num_classes, width))
            self.query = nn.Parameter(torch.randn(num_levels, width) * 0.1)
            if positions or (positions is None and not own):
                self.positions = nn.Parameter(torch.randn(length, width) * 0.1)
            else:
                self.register_parameter("positions", None)
            if causal:
                self.register_parameter("hidden", None)
                self.register_parameter("current", None)
            else:
                self.hidden = nn.Parameter(torch.randn(width))
                self.current = nn.Parameter(torch.randn(num_levels, width) * 0.1)
        if align_context and context_features is None:
            raise UserError("align_context is set and there is no context: give `context_features`")
        if context_features is not None and not self.embeds:
            raise UserError(
                f"{type(backbone).__name__} has a row for every state of the dimensions and none "
                "for a context: choose another backbone"
            )
        self.context = None if context_features is None else nn.Linear(context_features, width)
        self.head = nn.Linear(width, num_outputs)
        self.grams = grams
        self.without_own = False
        if grams is not None:
            few = num_classes <= MOST_CLASSES
            self.looks_ahead = few and Ahead.of(ordering.levels(length)).any
            self.gate = nn.Linear(width, 2 if self.looks_ahead else 1)
            nn.init.zeros_(self.gate.weight)
            nn.init.ones_(self.gate.bias)

    def extra_repr(self) -> str:
        execution = "causal" if self.one_pass else "masked"
        return f"ordering={self.ordering!r}, execution={execution!r}, length={self.length}"

    @property
    def passes(self) -> int:
        """Evaluations of the backbone, one after the other, that generation takes."""
        return self.num_levels - self.first_level

    @property
    def steps(self) -> bool:
        """Whether generation goes by cached steps, one evaluation's work for all levels."""
        backbone = self.backbone
        return isinstance(backbone, SteppedBackbone) and backbone.steps and self.one_pass

    @property
    def left_to_right(self) -> bool:
        """Whether every dimension depends on all before it, and there is no context."""
        natural = torch.arange(self.length)
        return self.context is None and torch.equal(self.ordering.levels(self.length), natural)

    @property
    def carries(self) -> bool:
        """Whether windows can go on where others ended: :meth:`carry`."""
        left_to_right = self.left_to_right and self.grams is None
        return isinstance(self.backbone, LSTM) and self.one_pass and left_to_right

    def levels(self, length: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Returns the levels (d,) of so many dimensions, and the dimensions of every level."""
        dimensions = self._dimensions_of(length, device)
        return dimensions.levels, dimensions.members

    def _dimensions_of(self, length: int, device: torch.device, tokens: int = 0) -> _Dimensions:
        key = (length, device, tokens)
        if key not in self._dimensions:
            with torch.inference_mode(False):
                levels = self.ordering.levels(length)
                members = [
                    (levels == level).nonzero().squeeze(-1)
                    for level in range(int(levels.max()) + 1)
                ]
                lowest = int(levels.min())
                shifted = torch.cat([levels.new_full((tokens,), -1), levels - lowest])
                self._dimensions[key] = _Dimensions(
                    levels.to(device),
                    [numbers.to(device) for numbers in members],
                    [numbers.tolist() for numbers in members],
                    lowest,
                    shifted.to(device),
                    _runs(levels, 0 if self.grams is None else self.grams.order - 1).to(device),
                    Ahead(*(part.to(device) for part in Ahead.of(levels))),
                )
        return self._dimensions[key]

    def keeps_beginning(self, number: int, length: int) -> bool:
        """Says whether the first of so many dimensions depend on none of those behind them."""
        levels = self.ordering.levels(length)
        return number >= length or bool(levels[:number].max() <= levels[number:].min())

    def _content(self, y: Tensor) -> Tensor:
        if not self.embeds:
            return y
        if is_one_hot(y):
            return y.to(self.embedding.dtype) @ self.embedding
        return F.embedding(y, self.embedding)

    def _check_context(self, context: Tensor | None) -> None:
        if (context is None) == (self.context is None):
            return
        if context is None:
            raise UserError("the flow is conditional, and no context was given: call it with one")
        name = type(self.backbone).__name__
        raise UserError(
            f"a context was given to a {name} that takes none: "
            + ("set `context_features`" if self.embeds else "choose another backbone")
        )

    def _known(self, levels: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns what is known beforehand of dimensions of these levels (d,).

        It is their query, (d, width) or (N, d, width) where a context is aligned, and the tokens
        (N, S, width) of a context that is set in front.
        """
        query = self.query[levels]
        if self.positions is not None:
            query = query + self.positions[: len(levels)]
        self._check_context(context)
        if context is None or self.context is None:
            return query, None
        if context.shape[-1] != self.context.in_features:
            raise UserError(
                f"a context {tuple(context.shape)} has {context.shape[-1]} features, and "
                f"context_features is {self.context.in_features}: make the two the same"
            )
        vectors: Tensor = self.context(context.to(self.context.weight.dtype))
        if not self.align_context:
            return query, vectors.unsqueeze(1) if vectors.ndim == 2 else vectors
        if context.ndim != 3 or context.shape[1] not in (len(levels), self.length):
            raise UserError(
                f"a context {tuple(context.shape)} is to be aligned with {len(levels)} dimensions: "
                "give a vector for each, (batch, length, context_features), or unset align_context"
            )
        return query + vectors[:, : len(levels)], None

    def _causal_inputs(
        self, length: int, device: torch.device, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns query and levels of all that a level-causal backbone sees, and the tokens."""
        query, tokens = self._known(self._dimensions_of(length, device).levels, context)
        count = 0 if tokens is None else tokens.shape[1]
        if count:
            query = torch.cat([query.new_zeros(count, self.width), query])
        return query, self._dimensions_of(length, device, count).shifted, tokens

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
            level: The level (N,) or (1,) that an example is evaluated for, with the values of this
                and of higher levels hidden; nothing where the backbone is to keep to the ordering.
            context: Vectors (N, C) or sequences (N, S, C); (N, D, C) where it is aligned.
            only: The n dimensions that are asked for; all d where they are not given.

        Returns:
            Features (N, d, width) or (N, n, width).

        Raises:
            UserError: If the backbone returns another shape, or a context is missing or too many.
        """
        levels = self.levels(y.shape[1], y.device)[0]
        visible = None if level is None else levels < level.unsqueeze(-1)
        if not self.embeds:
            self._check_context(context)
            if visible is not None:
                y = y * visible.unsqueeze(-1) if is_one_hot(y) else y * visible
            features: Tensor = self.backbone(y, None, levels)
            return features if only is None else features[:, only]
        content = self._content(y)
        inputs: tuple[Tensor, ...]
        if self.level_causal:
            query, levels, tokens = self._causal_inputs(y.shape[1], y.device, context)
            if visible is not None:
                content = content * visible.unsqueeze(-1)
            if tokens is not None:
                content = torch.cat([tokens.to(content.dtype), content], dim=1)
            inputs = content, query, levels
        else:
            query, tokens = self._known(levels, context)
            if level is None or visible is None:
                raise RuntimeError("a backbone that is not level-causal runs masked")
            content = torch.where(visible.unsqueeze(-1), content, self.hidden.to(content.dtype))
            content = content + (query + self.current[level].unsqueeze(1))
            if tokens is not None:
                content = torch.cat([tokens.to(content.dtype), content], dim=1)
            inputs = (content,)
        count = content.shape[1] - y.shape[1]
        backbone = self.backbone
        if only is not None and isinstance(backbone, Backbone):
            return accelerated(type(backbone).features_at)(
                backbone, only + count if count else only, *inputs
            )
        features = accelerated(_evaluate)(backbone, *inputs)
        if features.shape != content.shape:
            raise UserError(
                f"{type(self.backbone).__name__} returned features {tuple(features.shape)} for "
                f"features {tuple(content.shape)}: a backbone must keep (batch, length, width)"
            )
        features = features[:, count:]
        return features if only is None else features[:, only]

    def _logits(self, features: Tensor, y: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Computes logits of features; of all dimensions, of some (n,), or of those true (N, d)."""
        # In full precision under autocast: logits in bfloat16 tie, and likelihoods suffer.
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.head.weight.dtype)
            logits: Tensor = self.head(features)
            if self.grams is None:
                return logits
            known = self._gram_logits(self.grams, y, chosen)
            return logits + (self.gate(features).unsqueeze(-2) * known.to(logits.dtype)).sum(dim=-1)

    @torch.no_grad()
    def _gram_logits(self, grams: NGrams, y: Tensor, chosen: Tensor | None) -> Tensor:
        """Computes log-probabilities (…, K, 1) after what is known right before the dimensions.

        Beside them, (…, K, 2), are the log-likelihoods of what is known ahead.
        """
        y = to_indices(y)
        dimensions = self._dimensions_of(y.shape[1], y.device)
        parts = [grams.pack(y), dimensions.runs.expand_as(y), y]
        if self.looks_ahead:
            gap, has_second = dimensions.ahead
            place = (torch.arange(y.shape[1], device=y.device) + gap + 1).clamp(max=y.shape[1] - 1)
            second = y[:, (place + 1).clamp(max=y.shape[1] - 1)]
            second = second.masked_fill(~has_second, self.num_classes)
            parts += [gap.expand_as(y), y[:, place], second, y.roll(1, dims=1)]
            if self.without_own:
                end = (place + has_second).clamp(max=y.shape[1] - 1)
                parts += [
                    likelihood[:, end] - likelihood for likelihood in self._trigram_paths(grams, y)
                ]
        if chosen is not None:
            mask = chosen.dtype == torch.bool
            parts = [part[chosen] if mask else part[:, chosen] for part in parts]
        history, seen, own, *ahead = (part.flatten() for part in parts)
        known = [grams.following(history, seen, own if self.without_own else None).log()]
        if ahead:
            gap, first, second, before, *rest = ahead
            occurrences = (own, rest[0], rest[1]) if rest else None
            known.append(grams.ahead(gap, first, second, before, occurrences).to(known[0].dtype))
        return torch.stack(known, dim=-1).unflatten(0, parts[0].shape)

    @staticmethod
    def _trigram_paths(grams: NGrams, y: Tensor) -> tuple[Tensor, Tensor]:
        """Computes log-likelihoods (N, d) up to dimensions, with their own counts and without."""
        history, seen = grams.pack(y).flatten(), torch.arange(y.shape[1], device=y.device)
        seen = seen.clamp(max=2).expand_as(y).flatten()
        classes = y.flatten()
        with_own, without = (
            grams.following(history, seen, own).gather(-1, classes.unsqueeze(-1)).log()
            for own in (None, classes)
        )
        return with_own.reshape(y.shape).cumsum(1), without.reshape(y.shape).cumsum(1)

    def _level(self, level: int, device: torch.device) -> Tensor:
        return torch.full((1,), level, device=device)

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Computes the logits of all dimensions.

        Args:
            y: Indices (N, d) or one-hot vectors (N, d, K).
            context: As in :meth:`features`.

        Returns:
            Logits (N, d, num_outputs); zeros for dimensions that need no network.
        """
        _, members = self.levels(y.shape[1], y.device)
        if self.one_pass:
            logits = self._logits(self.features(y, None, context), y)
            if self.first_level:
                logits = logits.index_fill(1, members[0], 0)
            return logits
        logits = self.head.weight.new_zeros(*y.shape[:2], self.num_outputs)
        needed = range(self.first_level, len(members))
        if not needed:
            return logits
        parts = [self.level_logits(y, level, context) for level in needed]
        return logits.index_copy(1, torch.cat(members[self.first_level :]), torch.cat(parts, 1))

    def carry(
        self, y: Tensor, last: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Computes the logits of windows that go on where others ended, with an LSTM.

        Args:
            y: Indices (N, d).
            last: The value (N,) before each window; -1 where one begins anew, from a state of 0.
            state: Hidden and cell state (layers, N, hidden) behind it; zeros where not given.

        Returns:
            Logits (N, d, num_outputs), and the state after the windows.

        Raises:
            UserError: If the backbone is no LSTM that reads from left to right.
        """
        backbone = self.backbone
        if not isinstance(backbone, LSTM) or not self.carries:
            raise UserError(
                f"a {type(backbone).__name__} over {self.ordering!r} carries no state from window "
                "to window: choose an LSTM over Natural, without a context or n-grams"
            )
        query, levels, _ = self._causal_inputs(y.shape[1], y.device, None)
        begins = (last < 0).unsqueeze(-1)
        before = torch.where(begins, backbone.start, self._content(last.clamp(min=0)))
        if state is not None:
            hidden, cells = state
            state = hidden.masked_fill(begins, 0), cells.masked_fill(begins, 0)
        features, state = backbone.carry(self._content(y), query, levels, before, state)
        return self._logits(features, y), state

    def layers(self, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Computes the logits of all dimensions, and what was known on the way to them.

        Args:
            y: Indices (N, d).

        Returns:
            Logits (N, d, num_outputs), and features (N, d, width) after every layer of a
            Transformer, of others those that the logits were read off alone. These come last.

        Raises:
            UserError: If the backbone does not run in one pass, or takes a context.
        """
        if not self.one_pass or not self.embeds:
            raise UserError(
                f"a {type(self.backbone).__name__} does not give the features of all dimensions "
                "in one pass: choose a level-causal backbone"
            )
        if isinstance(self.backbone, Transformer):
            query, levels, _ = self._causal_inputs(y.shape[1], y.device, None)
            features = self.backbone.layer_features(self._content(y), query, levels)
        else:
            features = [self.features(y)]
        return self._logits(features[-1], y), features

    def level_logits(self, y: Tensor, level: int, context: Tensor | None = None) -> Tensor:
        """Computes the logits (N, n, num_outputs) of the n dimensions of one level.

        Only the values of lower levels matter, those of others may be anything.
        """
        _, members = self.levels(y.shape[1], y.device)
        only = members[level]
        return self._logits(self._at(y, level, context, only), y, only)

    def _at(self, y: Tensor, level: int, context: Tensor | None, only: Tensor) -> Tensor:
        """Computes the features (N, n, width) of dimensions of one level, in one evaluation."""
        hide = None if self.one_pass else self._level(level, y.device)
        return self.features(y, hide, context, only)

    def drawn_logits(
        self, y: Tensor, level: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes the logits of one level for every example, in one evaluation.

        Args:
            y: Indices (N, d).
            level: The level (N,) of every example.
            context: As in :meth:`features`.

        Returns:
            The dimensions of these levels, boolean (N, d) with M true entries, and their logits
            (M, num_outputs).
        """
        levels, _ = self.levels(y.shape[1], y.device)
        drawn = levels == level.unsqueeze(-1)
        hide = None if self.one_pass else level
        return drawn, self._logits(self.features(y, hide, context)[drawn], y, drawn)

    def by_levels(
        self, y: Tensor, decide: Decide, context: Tensor | None = None, known: int = 0
    ) -> Tensor:
        """Decides the values level by level, in one evaluation each.

        Args:
            y: Indices (N, d) or one-hot vectors (N, d, K), right where no network is needed.
            decide: What the values of a level are, given its dimensions and logits.
            context: As in :meth:`features`.
            known: The first so many dimensions are right, too, and are not decided; they must
                depend on none behind them (:meth:`keeps_beginning`).

        Returns:
            The values, in the representation of `y`.
        """
        dimensions = self._dimensions_of(y.shape[1], y.device)
        evaluate = self._evaluator(y, context)
        for level in range(self.first_level, len(dimensions.members)):
            unknown, before = dimensions.unknown(level, known)
            features = evaluate(y, level, unknown, before)
            if features is not None:
                logits = self._logits(features, y, unknown)
                y = y.index_copy(1, unknown, decide(unknown, logits))
        return y

    def _evaluator(
        self, y: Tensor, context: Tensor | None
    ) -> Callable[[Tensor, int, Tensor, int], Tensor | None]:
        """Returns what computes features of one level after the other, where any are asked for.

        It is told the level, the dimensions of it that are asked for, and how many come before
        them. It goes by cached steps where the backbone offers them and no gradient is asked for.
        """
        backbone = self.backbone
        if (
            not isinstance(backbone, SteppedBackbone)
            or not self.steps
            or is_one_hot(y)
            or torch.is_grad_enabled()
        ):
            return lambda y, level, only, _: (
                self._at(y, level, context, only) if len(only) else None
            )
        dimensions = self._dimensions_of(y.shape[1], y.device)
        query, levels, tokens = self._causal_inputs(y.shape[1], y.device, context)
        cache = backbone.begin(query, levels, y.shape[0])
        first = backbone.advance(cache, 0, tokens)

        def evaluate(y: Tensor, level: int, only: Tensor, before: int) -> Tensor | None:
            features = first
            if level > dimensions.lowest:
                content = self._content(y[:, dimensions.members[level - 1]])
                features = backbone.advance(cache, level - dimensions.lowest, content)
            return features[:, before:] if len(only) else None

        return evaluate

    def fixed_point(
        self, y: Tensor, decide: Decide, context: Tensor | None = None, known: int = 0
    ) -> tuple[Tensor, int]:
        """Decides the values of all dimensions at once, again and again until nothing changes.

        An iteration settles at least one more level, so that the values are those of
        :meth:`by_levels` after as many iterations as levels at most, and one to see it.

        Args:
            y: Indices (N, d), right where no network is needed, anything elsewhere.
            decide: As in :meth:`by_levels`.
            context: As in :meth:`features`.
            known: As in :meth:`by_levels`.

        Returns:
            The values (N, d) and the number of iterations.
        """
        _, members = self.levels(y.shape[1], y.device)
        if len(members) <= self.first_level:
            return y, 0
        dimensions = torch.cat(members[self.first_level :]).sort().values
        dimensions = dimensions[dimensions >= known]
        if not len(dimensions):
            return y, 0
        iterations = 0
        for _ in range(len(members) + 1):
            iterations += 1
            values = decide(dimensions, self(y, context)[:, dimensions])
            settled = torch.equal(values, y[:, dimensions])
            y = y.index_copy(1, dimensions, values)
            if settled:
                break
        return y, iterations
