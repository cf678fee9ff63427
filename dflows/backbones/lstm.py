"""An LSTM along lanes, or both ways under masking."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.arguments import check_dropout, check_layers, check_positive
from dflows.backbones.ahead import Ahead, Readout
from dflows.backbones.backbone import State, StatefulBackbone
from dflows.backbones.checks import check_causal, check_features, check_next_level
from dflows.backbones.lanes import known_ahead, lanes_behind_context, steps_ahead
from dflows.backbones.stepped_lstm import SteppedLSTM
from dflows.errors import UserError
from dflows.remembered import Remembered
from dflows.representations import lstm_autocast

__all__ = ["LSTM"]


class LSTM(StatefulBackbone):
    """Creates an LSTM: level-causal along lanes, or bidirectional and seeing everything.

    A lane is a run of neighbouring dimensions whose levels rise by one from 0. The natural and the
    reversed ordering are one lane; :class:`~dflows.orderings.Strided` has many, which are read side
    by side. The input of a step is the content of the dimension before in the lane plus the query
    of its own, so that the output depends on all earlier dimensions of the lane; and on those
    beyond its end that are of lower level, as far as `ahead` reaches. The features are a linear map
    of the hidden units and a small network beside it.

    Args:
        width: Features of one dimension.
        layers: Number of layers.
        bidirectional: Whether to read both ways; such a network is not level-causal and serves any
            ordering, masked.
        hidden: Hidden units of a layer and direction; `width` by default.
        readout: Hidden units of the small network; twice the width by default, 0 for none.
        ahead: Distance to which dimensions beyond the end of a lane are seen; 0 for none.
        dropout: Probability that a feature is dropped between two layers, or behind the last.
        weight_drop: Probability that a weight from hidden units to hidden units is dropped in
            training, the same ones in all steps of one evaluation.

    Raises:
        UserError: If a size is out of range, or a probability is outside [0, 1).

    References:
        | Long Short-Term Memory (Hochreiter & Schmidhuber, 1997)
        | Bidirectional Recurrent Neural Networks (Schuster & Paliwal, 1997)
        | Regularizing and Optimizing LSTM Language Models (Merity et al., 2018): dropped weights
        | https://arxiv.org/abs/1708.02182

    Example:
        >>> backbone = LSTM(width=8, ahead=2)
        >>> content, query = torch.randn(3, 6, 8), torch.randn(6, 8)
        >>> backbone(content, query, levels=torch.tensor([0, 1, 2, 0, 1, 2])).shape
        torch.Size([3, 6, 8])
        >>> backbone(content, query, levels=torch.tensor([0, 2, 1, 2, 0, 1]))
        Traceback (most recent call last):
        ...
        dflows.errors.UserError: an LSTM reads one dimension after the other ...
    """

    def __init__(
        self,
        width: int,
        layers: int = 1,
        bidirectional: bool = False,
        hidden: int | None = None,
        readout: int | None = None,
        ahead: int = 0,
        dropout: float = 0.0,
        weight_drop: float = 0.0,
    ) -> None:
        super().__init__(width, level_causal=not bidirectional)
        hidden = width if hidden is None else hidden
        readout = 2 * width if readout is None else readout
        check_layers(layers=layers)
        check_positive(hidden=hidden)
        if min(readout, ahead) < 0:
            raise UserError(f"readout is {readout} and ahead {ahead}: give at least 0")
        if ahead and bidirectional:
            raise UserError(
                f"ahead is {ahead}, and a bidirectional LSTM sees all that is not masked: unset "
                "one of them"
            )
        check_dropout(dropout)
        check_dropout(weight_drop, "weight_drop")
        self.knows_levels = self.level_causal
        self.weight_drop = weight_drop
        self.lstm = nn.LSTM(
            width,
            hidden,
            layers,
            batch_first=True,
            bidirectional=bidirectional,
            # PyTorch warns of a dropout that a single layer has no place for.
            dropout=dropout if layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(dropout)
        outputs = hidden * (2 if bidirectional else 1)
        self.linear = nn.Linear(outputs, width)
        self.readout = Readout(outputs, readout, width) if readout else None
        self.ahead = Ahead(width, ahead, outputs) if ahead else None
        if self.level_causal:
            self.start = nn.Parameter(torch.randn(width))
        self._route = Remembered(partial(route, reach=ahead))

    def extra_repr(self) -> str:
        return f"width={self.width}"

    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        if not self.level_causal:
            check_features(self, content)
            return self._features(self._read(content)[0])
        query, levels = check_causal(self, content, query, levels)
        way = self._route(levels)
        looked = idle = None
        if self.ahead is not None and not len(way.near):
            # Distributed training waits for the gradients of all parameters.
            idle = sum(0 * parameter.sum() for parameter in self.ahead.parameters())
        elif self.ahead is not None:
            narrow = F.pad(self.ahead.narrow(content), (0, 0, 0, 1))
            looked = self.ahead.see(narrow, way.seen, way.steps)
            query = query.to(looked.dtype).expand_as(content).index_add(1, way.near, looked)
        rows = torch.cat([self.start.expand(len(content), 1, -1), content], dim=1)
        lanes = rows[:, way.before] + query[..., way.own, :]
        hidden = self._read(lanes.flatten(0, 1))[0].reshape(
            len(content), -1, self.linear.in_features
        )
        features = self._features(hidden[:, way.places], looked, way.near)
        return features if idle is None else features + idle

    def features_at(
        self,
        dimensions: Tensor,
        content: Tensor,
        query: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Tensor:
        if self.level_causal:
            return super().features_at(dimensions, content, query, levels)
        check_features(self, content)
        return self._features(self._read(content)[0][:, dimensions])

    @property
    def stateful(self) -> bool:
        return self.level_causal

    def resume(
        self,
        content: Tensor,
        query: Tensor,
        levels: Tensor,
        before: Tensor,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        query, levels = check_causal(self, content, query, levels)
        way = self._route(levels)
        if not self.stateful or way.context or not way.natural:
            raise UserError(
                "an LSTM carries its state from left to right: choose the ordering Natural, "
                "bidirectional=False, and no context"
            )
        rows = torch.cat([before.unsqueeze(1), content[:, :-1]], dim=1)
        outputs, state = self._read(rows + query, state)
        return self._features(outputs), state

    def _read(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        with lstm_autocast():
            lstm, inputs = self.lstm, inputs.to(self.linear.weight.dtype)
            if not (self.training and self.weight_drop):
                return lstm(inputs, state)
            if state is None:
                directions = 2 if lstm.bidirectional else 1
                shape = (directions * lstm.num_layers, len(inputs), lstm.hidden_size)
                state = inputs.new_zeros(shape), inputs.new_zeros(shape)
            weights = []
            for input_weight, hidden_weight, *biases in lstm.all_weights:
                weights += [input_weight, F.dropout(hidden_weight, self.weight_drop), *biases]
            outputs, *after = torch.lstm(
                inputs,
                state,
                weights,
                lstm.bias,
                lstm.num_layers,
                lstm.dropout,
                self.training,
                lstm.bidirectional,
                lstm.batch_first,
            )
            return outputs, tuple(after)

    def _features(
        self, hidden: Tensor, looked: Tensor | None = None, near: Tensor | None = None
    ) -> Tensor:
        """Computes features from hidden units (B, D, hidden), and from what dimensions see."""
        hidden = self.dropout(hidden)
        features: Tensor = self.linear(hidden)
        if self.readout is not None:
            features = features + self.readout(hidden)
        if self.ahead is not None and looked is not None and near is not None:
            told = self.ahead.tell(hidden[:, near], looked)
            features = features.index_add(1, near, told.to(features.dtype))
        return features

    @torch.no_grad()
    def begin(self, query: Tensor, levels: Tensor, batch_size: int) -> "Cache":
        if not self.level_causal:
            raise UserError("a bidirectional LSTM has no steps: set bidirectional=False")
        check_causal(self, query.expand(batch_size, -1, -1), query, levels)
        way = self._route(levels)
        length, count = len(levels), len(way.own)
        cache = Cache(
            way=way,
            query=query.expand(batch_size, -1, -1),
            before=self.start.expand(batch_size, count, -1),
            lstm=SteppedLSTM(self.lstm, batch_size * count),
        )
        if self.ahead is not None and len(way.near):
            cache.narrow = query.new_zeros(batch_size, length + 1, self.ahead.narrow.out_features)
        return cache

    @torch.no_grad()
    def advance(self, cache: "Cache", level: int, content: Tensor | None) -> Tensor:
        way = cache.way
        stages = len(way.stages)
        first = cache.done == 0
        count = way.context if first else len(way.stages[cache.done - 1].dimensions)
        check_next_level(level, cache.done, content, [len(cache.query), count, self.width])
        if level >= stages:
            raise UserError(f"level {level} was asked for, and there are {level} levels")
        if first and content is not None:
            for token, row in enumerate(content.unbind(1)):
                self._step(cache, cache.query[:, [token]])
                cache.before = row.unsqueeze(1).expand_as(cache.before)
        elif content is not None:
            self._remember(cache, way.stages[cache.done - 1], content)
        stage = way.stages[level]
        query = cache.query[:, stage.dimensions]
        looked = None
        if self.ahead is not None and cache.narrow is not None and len(stage.near):
            looked = self.ahead.see(cache.narrow, stage.seen, stage.steps)
            query = query.index_add(1, stage.near, looked.to(query.dtype))
        cache.done += 1
        if stage.lanes is not None:
            query = query.new_zeros(cache.before.shape).index_copy(1, stage.lanes, query)
        hidden = self._step(cache, query)
        if stage.lanes is not None:
            hidden = hidden[:, stage.lanes]
        return self._features(hidden, looked, stage.near)

    def _remember(self, cache: "Cache", stage: "Stage", content: Tensor) -> None:
        """Keeps the content of a level for the step after it, and for those who see it ahead."""
        if self.ahead is not None and cache.narrow is not None:
            narrow = self.ahead.narrow(content).to(cache.narrow.dtype)
            cache.narrow.index_copy_(1, stage.dimensions, narrow)
        if stage.lanes is not None:
            content = cache.before.index_copy(1, stage.lanes, content.to(cache.before.dtype))
        cache.before = content

    def _step(self, cache: "Cache", query: Tensor) -> Tensor:
        """Reads one dimension of every lane and returns the hidden units (B, L, hidden)."""
        rows = (cache.before + query).flatten(0, 1)
        return cache.lstm.step(rows).view(len(query), -1, self.linear.in_features)


class Stage(NamedTuple):
    """One level of generation.

    `dimensions` (m,) are its dimensions, of the `lanes` (m,), or of all where it is None. `near`
    are places among these, whose dimensions see something ahead: `seen` (n, reach), the first of
    it at the distances `steps` (n,).
    """

    dimensions: Tensor
    lanes: Tensor | None
    near: Tensor
    seen: Tensor
    steps: Tensor


class Route(NamedTuple):
    """How an LSTM reads an event of D dimensions, S of them context, in L lanes of T = S + C steps.

    A lane reads the context first. `before` (L, T) is what a step reads, 0 for the start and 1 + d
    for the content of dimension d; `own` (L, T) is the dimension whose query it adds, and
    `places` (D,) says where its output is found in (L·T,). `near`, `seen` and `steps` are as in
    :class:`Stage`, for all dimensions at once. `natural` says whether the dimensions are read in
    their order.
    """

    before: Tensor
    own: Tensor
    places: Tensor
    near: Tensor
    seen: Tensor
    steps: Tensor
    stages: list[Stage]
    context: int
    natural: bool


def route(levels: Tensor, reach: int) -> Route:
    """Finds how to read dimensions along lanes.

    Args:
        levels: Levels (D,); entries of -1 in front are context and are read first.
        reach: Distance to which dimensions beyond the end of a lane are seen.

    Raises:
        UserError: If the levels do not run in lanes.
    """
    context, lanes = lanes_behind_context(
        levels,
        "an LSTM reads one dimension after the other",
        "set bidirectional=True, or take a Transformer",
    )
    inner = levels[context:]
    length, number = len(inner), len(lanes.dimensions)
    ended = lanes.dimensions == length
    dimensions = torch.where(ended, 0, lanes.dimensions + context)
    tokens = torch.arange(context, device=levels.device).expand(number, -1)
    own = torch.cat([tokens, dimensions], dim=1)
    before = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1] + 1], dim=1)
    places = own.new_empty(len(levels))
    steps_of = torch.arange(own.numel(), device=levels.device).view_as(own)
    places[:context] = steps_of[0, :context]
    places[dimensions[~ended]] = steps_of[:, context:][~ended]
    seen = known_ahead(inner, lanes.directions, reach)
    steps = steps_ahead(seen < length)
    seen = torch.where(seen < length, seen + context, len(levels))

    def near(among: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = (steps[among] > 0).nonzero().squeeze(-1)
        return places, seen[among[places]], steps[among[places]]

    stages = []
    for column, members in zip(lanes.dimensions.T, lanes.members, strict=True):
        found = column if members is None else column[members]
        stages.append(Stage(found + context, members, *near(found)))
    all_near, all_seen, all_steps = near(torch.arange(length, device=levels.device))
    natural = torch.equal(own[0], torch.arange(len(levels), device=levels.device))
    all_near = all_near + context
    return Route(before, own, places, all_near, all_seen, all_steps, stages, context, natural)


@dataclass
class Cache:
    """What an LSTM remembers between steps.

    Attributes:
        way: How it reads.
        query: Query (B, D, width).
        before: The content (B, L, width) that the lanes read next.
        lstm: The LSTM and its states, a row for every example and lane.
        narrow: Content through few features (B, D + 1, NARROW), where something sees ahead.
        done: Levels done.
    """

    way: Route
    query: Tensor
    before: Tensor
    lstm: SteppedLSTM
    narrow: Tensor | None = None
    done: int = 0
