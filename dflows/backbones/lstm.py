"""An LSTM, from left to right or right to left, or both ways under masking."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.arguments import check_dropout, check_positive
from dflows.backbones.backbone import State, StatefulBackbone
from dflows.backbones.checks import check_causal, check_features, check_next_level
from dflows.backbones.stepped_lstm import SteppedLSTM
from dflows.errors import UserError
from dflows.remembered import Remembered
from dflows.representations import without_autocast

__all__ = ["LSTM"]


class LSTM(StatefulBackbone):
    """Creates an LSTM: level-causal in one direction, or bidirectional and seeing everything.

    In one direction the input of a step is the content of the previous dimension plus the query of
    its own, so that the output depends on the content of all earlier dimensions and of no other. It
    serves the natural and the reversed ordering and refuses others.

    Args:
        width: Features of one dimension.
        layers: Number of layers.
        bidirectional: Whether to read both ways; such a network is not level-causal and serves any
            ordering, masked.
        hidden: Hidden units of a layer and direction; `width` by default.
        dropout: Probability that a feature is dropped between two layers.
        weight_drop: Probability that a weight from hidden units to hidden units is dropped in
            training, the same ones in all steps of one evaluation.

    Raises:
        UserError: If a size is below 1, or a probability is outside [0, 1).

    References:
        | Long Short-Term Memory (Hochreiter & Schmidhuber, 1997)
        | Bidirectional Recurrent Neural Networks (Schuster & Paliwal, 1997)
        | Regularizing and Optimizing LSTM Language Models (Merity et al., 2018): dropped weights
        | https://arxiv.org/abs/1708.02182

    Example:
        >>> backbone = LSTM(width=8)
        >>> content, query = torch.randn(3, 5, 8), torch.randn(5, 8)
        >>> backbone(content, query, levels=torch.arange(5)).shape
        torch.Size([3, 5, 8])
        >>> backbone(content, query, levels=torch.tensor([0, 1, 0, 1, 0]))
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
        dropout: float = 0.0,
        weight_drop: float = 0.0,
    ) -> None:
        super().__init__(width, level_causal=not bidirectional)
        hidden = width if hidden is None else hidden
        check_positive(layers=layers, hidden=hidden)
        check_dropout(dropout)
        check_dropout(weight_drop, "weight_drop")
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
        self.linear = nn.Linear(hidden * (2 if bidirectional else 1), width)
        if self.level_causal:
            self.start = nn.Parameter(torch.randn(width))
        self._order = Remembered(reading_order)

    def extra_repr(self) -> str:
        return f"width={self.width}"

    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        if not self.level_causal:
            check_features(self, content)
            return self._features(self._read(content)[0])
        query, levels = check_causal(self, content, query, levels)
        order, _ = self._order(levels)
        if order is not None:
            content, query = content[:, order], query[..., order, :]
        before = torch.cat([self.start.expand(len(content), 1, -1), content[:, :-1]], dim=1)
        features = self._features(self._read(before + query)[0])
        # The order is its own inverse: it leaves the dimensions, or turns round a part of them.
        return features if order is None else features[:, order]

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
        order, context = self._order(levels)
        if order is not None or context or not self.stateful:
            raise UserError(
                "an LSTM carries its state from left to right: choose the ordering Natural, "
                "bidirectional=False, and no context"
            )
        rows = torch.cat([before.unsqueeze(1), content[:, :-1]], dim=1)
        outputs, state = self._read(rows + query, state)
        return self._features(outputs), state

    def _read(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        # Processors without bfloat16 instructions have no LSTM for autocast to call.
        with without_autocast("cpu"):
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

    def _features(self, hidden: Tensor) -> Tensor:
        # Where rows are not contiguous PyTorch adds the bias apart, with one rounding more than in
        # the steps of generation: in bfloat16 a third of the features would differ.
        features: Tensor = self.linear(hidden if self.training else hidden.contiguous())
        return features

    @torch.no_grad()
    def begin(self, query: Tensor, levels: Tensor, batch_size: int) -> "Cache":
        if not self.level_causal:
            raise UserError("a bidirectional LSTM has no steps: set bidirectional=False")
        check_causal(self, query.expand(batch_size, -1, -1), query, levels)
        order, context = self._order(levels)
        return Cache(
            query=query if order is None else query[..., order, :],
            context=context,
            before=self.start.expand(batch_size, -1),
            lstm=SteppedLSTM(self.lstm, batch_size),
        )

    @torch.no_grad()
    def advance(self, cache: "Cache", level: int, content: Tensor | None) -> Tensor:
        first = cache.done == 0
        expected = max(0, cache.done - cache.context)
        count = cache.context if first else 1
        check_next_level(level, expected, content, [*cache.before.shape[:1], count, self.width])
        if level + cache.context >= cache.query.shape[-2]:
            raise UserError(f"level {level} was asked for, and there are {level} levels")
        rows = [] if content is None else list(content.unbind(1))
        for row in [cache.before, *rows] if first else rows:
            hidden = cache.lstm.step(row + cache.query[..., cache.done, :])
            cache.done += 1
        return self._features(hidden).unsqueeze(1)


def reading_order(levels: Tensor) -> tuple[Tensor | None, int]:
    """Finds the order in which to read dimensions whose levels rise or fall one by one.

    Args:
        levels: Levels (D,); entries of -1 in front are context and are read first.

    Returns:
        Indices (D,), or None where the dimensions are in order already; and the number of context
        dimensions, which come first.

    Raises:
        UserError: If the levels are neither those of natural nor those of reversed.
    """
    given = levels.tolist()
    context = sum(level < 0 for level in given)
    length = len(given) - context
    natural = list(range(length))
    if given == [-1] * context + natural:
        return None, context
    if given == [-1] * context + natural[::-1]:
        dimensions = torch.arange(len(given), device=levels.device)
        return torch.cat([dimensions[:context], dimensions[context:].flip(0)]), context
    raise UserError(
        "an LSTM reads one dimension after the other and serves the orderings Natural and "
        f"Reversed, not the levels {given[:16]}{' …' if len(given) > 16 else ''}: choose one of "
        "these orderings, set bidirectional=True, or take a Transformer"
    )


@dataclass
class Cache:
    """What an LSTM remembers between steps.

    Attributes:
        query: Query (D, width) or (B, D, width) in reading order.
        context: Number of context dimensions, which are read first.
        before: What stands for the content before the first dimension (B, width).
        lstm: The LSTM and its state.
        done: Dimensions read.
    """

    query: Tensor
    context: int
    before: Tensor
    lstm: SteppedLSTM
    done: int = 0
