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
        self._sights: dict[int, Sight] = {}

    def extra_repr(self) -> str:
        return f"width={self.width}, offsets={self.offsets}, window={len(self.near) // 2}"

    def _sights_of(self, levels: Tensor) -> "dict[int, Sight]":
        if levels is not self._levels:
            # A validation in inference mode may come first, and training uses the same masks.
            with torch.inference_mode(False):
                known = levels.clone()
                self._sights = {offset: Sight(known, offset) for offset in self.offsets + self.near}
            self._levels = levels
        return self._sights

    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        query, levels = check_causal(self, content, query, levels)
        sights = self._sights_of(levels)
        stream = query.to(content.dtype).expand(content.shape)
        if self.near:
            narrow = self.narrow(content)
            below = [_shift(narrow, offset) * sights[offset].lower for offset in self.near]
            stream = stream + self.widen(torch.cat(below, dim=-1))
        for layer in self.layers:
            stream = layer(stream, content, [sights[offset] for offset in self.offsets])
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

    def forward(self, stream: Tensor, content: Tensor, sights: "Sequence[Sight]") -> Tensor:
        """Adds the update to a stream (B, D, width), given the content (B, D, width)."""
        known = self.norm(stream)
        told = self.content_norm(stream + content)
        seen = torch.cat([known, *(sight(known, told) for sight in sights)], dim=-1)
        updated: Tensor = stream + self.out(self.dropout(F.glu(self.mix(seen), dim=-1)))
        return updated


class Sight:
    """Creates what a dimension may see of its neighbour at one offset.

    Arguments:
        levels: Levels (D,).
        offset: Where the neighbour is.
    """

    def __init__(self, levels: Tensor, offset: int) -> None:
        neighbour = torch.arange(len(levels), device=levels.device) + offset
        inside = (neighbour >= 0) & (neighbour < len(levels))
        level = levels[neighbour.clamp(0, len(levels) - 1)]
        self.offset = offset
        self.lower = (inside & (level < levels)).unsqueeze(-1)
        self.equal = (inside & (level == levels)).unsqueeze(-1)
        self.has_lower = bool(self.lower.any())
        self.has_equal = bool(self.equal.any())

    def __call__(self, known: Tensor, told: Tensor) -> Tensor:
        """Picks of the neighbour (B, D, W) what may be seen.

        That is what is told at lower levels, and at the same level what is known.
        """
        if not self.has_equal:
            return _shift(told, self.offset) * self.lower
        equal = _shift(known, self.offset) * self.equal
        return equal + _shift(told, self.offset) * self.lower if self.has_lower else equal


def _shift(value: Tensor, offset: int) -> Tensor:
    """Returns the neighbour (B, D, W) at an offset, zeros beyond the ends."""
    if abs(offset) >= value.shape[1]:
        return torch.zeros_like(value)
    if offset > 0:
        return F.pad(value[:, offset:], (0, 0, 0, offset))
    return F.pad(value[:, :offset], (0, 0, -offset, 0))
