"""An LSTM, from left to right or right to left, or both ways under masking."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.backbones.backbone import (
    Remembered,
    SteppedBackbone,
    check_causal,
    check_dropout,
    check_features,
    check_next_level,
    check_positive,
)
from dflows.errors import UserError

__all__ = ["LSTM"]


class LSTM(SteppedBackbone):
    """Creates an LSTM: level-causal in one direction, or bidirectional and seeing everything.

    In one direction the input of a step is the content of the dimension before plus the query of
    its own, so that the output knows the content of all earlier dimensions and of no other. It
    serves the orderings that are sequences of neighbours, natural and reversed, and refuses others.

    Arguments:
        width: Features of one dimension.
        layers: Number of layers.
        bidirectional: Whether to read both ways; such a network is not level-causal and runs
            masked, with any ordering.
        hidden: Hidden units of a layer and direction; as many as the width if not given.
        dropout: Probability that a feature is dropped between two layers.

    Raises:
        UserError: If a size is below 1.

    References:
        | Long Short-Term Memory (Hochreiter & Schmidhuber, 1997)
        | Bidirectional Recurrent Neural Networks (Schuster & Paliwal, 1997)

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
    ) -> None:
        super().__init__(width, level_causal=not bidirectional)
        hidden = width if hidden is None else hidden
        check_positive(layers=layers, hidden=hidden)
        check_dropout(dropout)
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
            features: Tensor = self.linear(self._read(content))
            return features
        query, levels = check_causal(self, content, query, levels)
        order, _ = self._order(levels)
        if order is not None:
            content, query = content[:, order], query[..., order, :]
        before = torch.cat([self.start.expand(len(content), 1, -1), content[:, :-1]], dim=1)
        features = self.linear(self._read(before + query))
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
        features: Tensor = self.linear(self._read(content)[:, dimensions])
        return features

    def _read(self, inputs: Tensor) -> Tensor:
        # Processors without bfloat16 instructions have no LSTM for autocast to call.
        with torch.autocast("cpu", enabled=False):
            outputs: Tensor = self.lstm(inputs.to(self.linear.weight.dtype))[0]
            return outputs

    @torch.no_grad()
    def begin(self, query: Tensor, levels: Tensor, batch_size: int) -> "State":
        if not self.level_causal:
            raise UserError("a bidirectional LSTM has no steps: set bidirectional=False")
        check_causal(self, query.expand(batch_size, -1, -1), query, levels)
        order, context = self._order(levels)
        zeros = query.new_zeros(batch_size, self.lstm.hidden_size)
        return State(
            query=query if order is None else query[..., order, :],
            context=context,
            before=self.start.expand(batch_size, -1),
            hidden=[zeros] * self.lstm.num_layers,
            cells=[zeros] * self.lstm.num_layers,
        )

    @torch.no_grad()
    def advance(self, cache: "State", level: int, content: Tensor | None) -> Tensor:
        first = cache.done == 0
        expected = max(0, cache.done - cache.context)
        count = cache.context if first else 1
        check_next_level(level, expected, content, [*cache.before.shape[:1], count, self.width])
        if level + cache.context >= cache.query.shape[-2]:
            raise UserError(f"level {level} was asked for, and there are {level} levels")
        known = [] if content is None else list(content.unbind(1))
        inputs = [cache.before, *known] if first else known
        for row in inputs:
            x = row + cache.query[..., cache.done, :]
            for layer, weights in enumerate(self.lstm.all_weights):
                state = cache.hidden[layer], cache.cells[layer]
                cache.hidden[layer], cache.cells[layer] = torch.lstm_cell(x, state, *weights)
                x = F.dropout(cache.hidden[layer], self.lstm.dropout, self.training)
            cache.done += 1
        features: Tensor = self.linear(cache.hidden[-1])
        return features.unsqueeze(1)


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
class State:
    """What an LSTM remembers between steps.

    Attributes:
        query: Query (D, width) or (B, D, width) in reading order.
        context: Number of context dimensions, which are read first.
        before: What stands in for the content before the first dimension (B, width).
        hidden: Hidden state (B, hidden) of every layer.
        cells: Cell state (B, hidden) of every layer.
        done: Dimensions read.
    """

    query: Tensor
    context: int
    before: Tensor
    hidden: list[Tensor]
    cells: list[Tensor]
    done: int = 0
