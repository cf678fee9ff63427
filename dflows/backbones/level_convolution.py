"""Level-causal gated convolutions."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.backbones.backbone import Backbone, check_causal, check_dropout, check_positive
from dflows.errors import UserError

__all__ = ["LevelConvolution"]


class LevelConvolution(Backbone):
    """Creates gated layers over neighbours that keep to an ordering: level-causal convolutions.

    The stream of a dimension starts from its query and never holds its content. A layer sees, at
    every distance on both sides, the content of neighbours of lower levels together with their
    stream, and of neighbours of the same level the stream alone. One evaluation supervises all
    dimensions at once, which makes it the quickest to learn text with few passes on a CPU.

    Arguments:
        width: Features of one dimension.
        layers: Number of layers.
        distances: Distances of the neighbours that a layer sees.
        window: Neighbours on each side whose content is read at once before the first layer,
            through few features each; 0 leaves this out.
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
        check_positive(layers=layers)
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
        self._levels: Tensor | None = None
        self._sources: tuple[Tensor, Tensor] | None = None

    def extra_repr(self) -> str:
        return f"width={self.width}, offsets={self.offsets}, window={len(self.near) // 2}"

    def _sources_of(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        if levels is not self._levels or self._sources is None:
            # A validation in inference mode may come first, and training uses the same tables.
            with torch.inference_mode(False):
                known = levels.clone()
                self._sources = _sources(known, self.near), _sources(known, [0, *self.offsets])
            self._levels = levels
        return self._sources

    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        query, levels = check_causal(self, content, query, levels)
        near, sources = self._sources_of(levels)
        stream = query.to(content.dtype).expand(content.shape)
        if self.near:
            narrow = self.narrow(content)
            # Before the first layer nothing is known of the neighbours of the same level.
            stream = stream + self.widen(_gather(narrow, torch.zeros_like(narrow), near))
        for layer in self.layers:
            stream = layer(stream, content, sources)
        features: Tensor = self.norm(stream)
        return features


class LevelGatedLayer(nn.Module):
    """Creates one residual layer over neighbours that the levels let it see.

    Arguments:
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
        seen = _gather(self.content_norm(stream + content), self.norm(stream), sources)
        updated: Tensor = stream + self.out(self.dropout(F.glu(self.mix(seen), dim=-1)))
        return updated


def _sources(levels: Tensor, offsets: Sequence[int]) -> Tensor:
    """Tabulates what a dimension may see of its neighbours.

    Of D dimensions, the numbers 0..D-1 stand for what is told, with content; D..2D-1 for what is
    known without it; and 2D for nothing.

    Args:
        levels: Levels (D,).
        offsets: Where the n neighbours are.

    Returns:
        Numbers (D, n): told of a neighbour of lower level, known of one of the same level, nothing
        of one of a higher level or beyond the ends.
    """
    length = len(levels)
    dimension = torch.arange(length, device=levels.device).unsqueeze(-1)
    neighbour = dimension + torch.tensor(offsets, dtype=torch.long, device=levels.device)
    inside = (neighbour >= 0) & (neighbour < length)
    neighbour = neighbour.clamp(0, length - 1)
    level, own = levels[neighbour], levels.unsqueeze(-1)
    source = torch.where(level < own, neighbour, neighbour + length)
    return torch.where(inside & (level <= own), source, 2 * length)


def _gather(told: Tensor, known: Tensor, sources: Tensor) -> Tensor:
    """Sets what the n neighbours show side by side, (B, D, n·W), in one look-up."""
    batch, length, width = told.shape
    rows = torch.cat([told, known, told.new_zeros(batch, 1, width)], dim=1)
    seen = rows.index_select(1, sources.flatten())
    return seen.reshape(batch, length, sources.shape[1] * width)
