"""Level-causal gated convolutions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.acceleration import accelerated
from dflows.arguments import check_dropout, check_layers
from dflows.backbones.backbone import SteppedBackbone
from dflows.backbones.checks import check_causal, check_next_level
from dflows.backbones.rows import look_up
from dflows.errors import UserError
from dflows.remembered import Remembered

__all__ = ["LevelConvolution"]


class LevelConvolution(SteppedBackbone):
    """Creates gated layers over neighbours that keep to an ordering: level-causal convolutions.

    The stream of a dimension starts from its query and never holds its content. At every distance
    on both sides a layer sees content and stream of neighbours of lower levels, and the stream
    alone of neighbours of the same level. One evaluation trains all dimensions at once: on a CPU
    no other backbone learns text with few passes as fast.

    Args:
        width: Features of one dimension.
        layers: Number of layers.
        distances: Distances of the neighbours that a layer sees.
        window: Neighbours on each side whose content is read before the first layer, through few
            features each; 0 for none.
        dropout: Probability that a gated feature is dropped.

    Raises:
        UserError: If a size is below 1.

    References:
        | Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016)
        | https://arxiv.org/abs/1606.05328

    Example:
        >>> from dflows.orderings import Strided
        >>> network = LevelConvolution(width=8, layers=2)
        >>> content, query = torch.randn(2, 12, 8), torch.randn(12, 8)
        >>> network(content, query, Strided(columns=4).levels(12)).shape
        torch.Size([2, 12, 8])
    """

    checkpoints_gradients = True

    def __init__(
        self,
        width: int,
        layers: int = 4,
        distances: Sequence[int] = (1, 2, 4, 8),
        *,
        window: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, level_causal=True)
        check_layers(layers=layers, window=max(window, 1))
        check_dropout(dropout)
        if not distances or min(distances) < 1 or window < 0:
            raise UserError(
                f"distances is {list(distances)} and window {window}: give distances of at least 1 "
                "and a window of at least 0"
            )
        self.offsets = [sign * distance for distance in distances for sign in (-1, 1)]
        self.near = [offset for offset in range(-window, window + 1) if offset]
        if window:
            narrow = max(width // 4, 1)
            self.narrow = nn.Linear(width, narrow)
            self.widen = nn.Linear(len(self.near) * narrow, width, bias=False)
        layered = nn.ModuleList(
            LevelGatedLayer(width, 1 + len(self.offsets), dropout) for _ in range(layers)
        )
        self.layers = cast("Sequence[LevelGatedLayer]", layered)
        for layer in self.layers:  # a stack of any depth starts as calm as one layer
            nn.init.normal_(layer.out.weight, std=0.02 / layers**0.5)
            nn.init.zeros_(layer.out.bias)
        self.norm = nn.LayerNorm(width)
        self._layout = Remembered(partial(layout, near=self.near, offsets=self.offsets))

    def extra_repr(self) -> str:
        return f"width={self.width}, offsets={self.offsets}, window={len(self.near) // 2}"

    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        query, levels = check_causal(self, content, query, levels)
        near, sources, _ = self._layout(levels)
        stream = query.to(content.dtype).expand(content.shape)
        if self.near:
            narrow = self.narrow(content)
            # Before the first layer a row without content is empty.
            stream = stream + self.widen(_gather(narrow, torch.zeros_like(narrow), near))
        for layer in self.layers:
            stream = self.run_layer(layer, stream, content, sources)
        features: Tensor = self.norm(stream)
        return features

    @torch.no_grad()
    def begin(self, query: Tensor, levels: Tensor, batch_size: int) -> "Cache":
        check_causal(self, query.expand(batch_size, -1, -1), query, levels)
        length = len(levels)
        cache = Cache(
            query=query.expand(batch_size, -1, -1),
            stages=self._layout(levels).stages,
            rows=[query.new_zeros(batch_size, 2 * length + 1, self.width) for _ in self.layers],
        )
        if self.near:
            cache.narrow = query.new_zeros(batch_size, length + 1, self.narrow.out_features)
        if len(cache.stages[0].members):
            self._stage(cache, None)
        else:
            cache.stage = 1
        return cache

    @torch.no_grad()
    def advance(self, cache: "Cache", level: int, content: Tensor | None) -> Tensor:
        members = cache.stages[cache.stage - 1].members
        shape = [cache.query.shape[0], len(members), self.width]
        check_next_level(level, cache.stage - 1, content, shape)
        if cache.stage >= len(cache.stages):
            raise UserError(f"level {level} was asked for, and there are {level} levels")
        features: Tensor = self.norm(self._stage(cache, content))
        return features

    def _stage(self, cache: "Cache", content: Tensor | None) -> Tensor:
        """Adds the content of the last stage to the cache and runs the dimensions of the next."""
        add_content = accelerated(LevelGatedLayer.add_content)
        step = accelerated(LevelGatedLayer.step)
        if content is not None:
            members = cache.stages[cache.stage - 1].members
            if cache.narrow is not None:
                narrow = self.narrow(content).to(cache.narrow.dtype)
                cache.narrow.index_copy_(1, members, narrow)
            for layer, rows, stream in zip(self.layers, cache.rows, cache.inputs, strict=True):
                add_content(layer, rows, members, stream, content)
        stage = cache.stages[cache.stage]
        cache.stage += 1
        stream, cache.inputs = cache.query[:, stage.members].contiguous(), []
        if cache.narrow is not None:
            stream = stream + self.widen(look_up(cache.narrow, stage.near))
        for layer, rows in zip(self.layers, cache.rows, strict=True):
            cache.inputs.append(stream)
            stream = step(layer, stream, rows, stage.blank, stage.sources)
        return stream


class Stage(NamedTuple):
    """What the dimensions of one level need.

    `members` (m,) are their indices, and `blank` (m,) their rows without content; `near` and
    `sources` (m, n) are the rows of the neighbours that they may see.
    """

    members: Tensor
    blank: Tensor
    near: Tensor
    sources: Tensor


class Layout(NamedTuple):
    """What the levels make of a window: the tables of all dimensions, and of every stage.

    The first stage is the context's, the others are the levels'.
    """

    near: Tensor
    sources: Tensor
    stages: list[Stage]


@dataclass
class Cache:
    """What a LevelConvolution remembers of the levels that it has computed.

    Attributes:
        query: Query (B, D, width).
        stages: The stages.
        rows: The rows (B, 2D + 1, width) that every layer reads, laid out as in :func:`_sources`.
        narrow: The narrow features of the content (B, D + 1, narrow), or None without a window.
        inputs: Input of every layer (B, m, width) for the stage that ran last.
        stage: Which of the stages is next.
    """

    query: Tensor
    stages: list[Stage]
    rows: list[Tensor]
    narrow: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    stage: int = 0


class LevelGatedLayer(nn.Module):
    """Creates one residual layer over neighbours that the levels let it see.

    Args:
        width: Features of one dimension.
        inputs: Neighbours, the dimension itself included.
        dropout: Probability that a gated feature is dropped.
    """

    def __init__(self, width: int, inputs: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.content_norm = nn.LayerNorm(width)
        self.mix = nn.Linear(inputs * width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, stream: Tensor, content: Tensor, sources: Tensor) -> Tensor:
        """Adds the update to a stream (B, D, width), given the content (B, D, width)."""
        informed = self.content_norm(stream + content)
        return self._update(stream, _gather(informed, self.norm(stream), sources))

    def add_content(self, rows: Tensor, members: Tensor, stream: Tensor, content: Tensor) -> None:
        """Sets the rows of dimensions (m,) with content, once it is there."""
        informed = self.content_norm(stream + content)
        rows.index_copy_(1, members, informed.to(rows.dtype))

    def step(self, stream: Tensor, rows: Tensor, blank: Tensor, sources: Tensor) -> Tensor:
        """Adds the update to the stream (B, m, width) of one level, seen in the rows."""
        rows.index_copy_(1, blank, self.norm(stream).to(rows.dtype))
        return self._update(stream, look_up(rows, sources))

    def _update(self, stream: Tensor, seen: Tensor) -> Tensor:
        updated: Tensor = stream + self.out(self.dropout(F.glu(self.mix(seen), dim=-1)))
        return updated


def layout(levels: Tensor, near: Sequence[int], offsets: Sequence[int]) -> Layout:
    """Tabulates what the dimensions may see of their neighbours.

    Args:
        levels: Levels (D,), -1 for context.
        near: Where the neighbours are whose content is read before the first layer.
        offsets: Where those of a layer are, beside the dimension itself.
    """
    length = len(levels)
    before, sources = _sources(levels, near), _sources(levels, [0, *offsets])
    stages = []
    for level in range(-1, int(levels.max()) + 1):
        members = (levels == level).nonzero().squeeze(-1)
        # Before the first layer a row without content is empty.
        near_members = before[members].clamp(max=length)
        stages.append(Stage(members, members + length, near_members, sources[members]))
    return Layout(before, sources, stages)


def _sources(levels: Tensor, offsets: Sequence[int]) -> Tensor:
    """Tabulates what a dimension may see of its neighbours.

    Of D dimensions, the rows 0..D-1 are those with content, D..2D-1 those without, and 2D is a row
    of zeros.

    Args:
        levels: Levels (D,).
        offsets: Where the n neighbours are.

    Returns:
        Rows (D, n): with content for a neighbour of lower level, without for one of the same level,
        and zeros for one of a higher level or beyond the ends.
    """
    length = len(levels)
    dimension = torch.arange(length, device=levels.device).unsqueeze(-1)
    neighbour = dimension + torch.tensor(offsets, dtype=torch.long, device=levels.device)
    inside = (neighbour >= 0) & (neighbour < length)
    neighbour = neighbour.clamp(0, length - 1)
    level, own = levels[neighbour], levels.unsqueeze(-1)
    source = torch.where(level < own, neighbour, neighbour + length)
    return torch.where(inside & (level <= own), source, 2 * length)


def _gather(informed: Tensor, blank: Tensor, sources: Tensor) -> Tensor:
    """Sets the rows of the n neighbours side by side, (B, D, n·W), in one look-up."""
    zeros = informed.new_zeros(informed.shape[0], 1, informed.shape[2])
    return look_up(torch.cat([informed, blank, zeros], dim=1), sources)
