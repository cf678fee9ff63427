"""Dilated convolutions: neighbours at a few distances, in gated residual layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.arguments import check_dropout, check_layers
from dflows.backbones.backbone import Backbone
from dflows.backbones.checks import check_features
from dflows.errors import UserError

__all__ = ["DilatedConvolution"]


class DilatedConvolution(Backbone):
    r"""Creates a stack of gated dilated convolutions that look both ways (not level-causal).

    With :math:`n` the layer norm of a layer, :math:`O` its offsets and zeros beyond the ends,

    .. math:: h_d \leftarrow h_d + a_d \odot \operatorname{sigmoid}(b_d), \quad
        (a_d, b_d) = \sum_{o \in O} W_o \, n(h)_{d + o} + c

    A layer is one matrix product over shifted copies of its input set side by side, which is
    quicker on a CPU than PyTorch's own convolution of short sequences.

    Args:
        width: Features of one dimension.
        layers: Number of layers.
        dilations: Distances of the neighbours, one entry a layer and repeated from the front when
            there are more layers. An entry may be a list: such a layer sees neighbours at each
            of its distances.
        kernel: Taps at every distance, an odd number: with 5 a layer of dilation 2 sees the
            offsets -4, -2, 0, 2 and 4.
        dropout: Probability that a layer's update of a feature is dropped.

    Raises:
        UserError: If a size is below 1 or the kernel even.

    References:
        | Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016)
        | https://arxiv.org/abs/1606.05328
        | Multi-Scale Context Aggregation by Dilated Convolutions (Yu & Koltun, 2016)
        | https://arxiv.org/abs/1511.07122

    Example:
        >>> backbone = DilatedConvolution(width=8, layers=3, dilations=[1, [2, 4]])
        >>> [layer.offsets for layer in backbone.layers]
        [(-1, 0, 1), (-4, -2, 0, 2, 4), (-1, 0, 1)]
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    checkpoints_gradients = True

    def __init__(
        self,
        width: int,
        layers: int = 5,
        dilations: Sequence[int | Sequence[int]] = (1, 2, 4, 8),
        kernel: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, level_causal=False)
        check_layers(layers=layers, kernel=kernel)
        check_dropout(dropout)
        if kernel % 2 == 0:
            raise UserError(f"kernel is {kernel}: give an odd number, so that it has a middle")
        distances = [[entry] if isinstance(entry, int) else list(entry) for entry in dilations]
        if not distances or any(not entry or min(entry) < 1 for entry in distances):
            raise UserError(f"dilations is {dilations}: give distances of at least 1")
        taps = range(-(kernel // 2), kernel // 2 + 1)
        offsets = [
            tuple(sorted({distance * tap for distance in entry for tap in taps}))
            for entry in distances
        ]
        self.layers = nn.ModuleList(
            GatedLayer(width, offsets[n % len(offsets)], dropout) for n in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def extra_repr(self) -> str:
        return f"width={self.width}"

    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        return self._compute(content, None)

    def features_at(
        self,
        dimensions: Tensor,
        content: Tensor,
        query: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Tensor:
        return self._compute(content, dimensions)

    def _compute(self, content: Tensor, only: Tensor | None) -> Tensor:
        check_features(self, content)
        features = content
        for n, layer in enumerate(self.layers, start=1):
            features = self.run_layer(layer, features, only if n == len(self.layers) else None)
        normed: Tensor = self.norm(features)
        return normed


class GatedLayer(nn.Module):
    """Creates one residual layer over the neighbours at given offsets.

    Args:
        width: Features of one dimension.
        offsets: Where the neighbours are; 0 is the dimension itself.
        dropout: Probability that a feature of the update is dropped.
    """

    def __init__(self, width: int, offsets: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.offsets = offsets
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(len(offsets) * width, 2 * width)
        self.dropout = nn.Dropout(dropout)

    def extra_repr(self) -> str:
        return f"offsets={self.offsets}"

    def forward(self, features: Tensor, only: Tensor | None = None) -> Tensor:
        """Adds the update to features (B, D, width); to the dimensions `only`, if given."""
        length, left = features.shape[1], -min(self.offsets)
        padded = F.pad(self.norm(features), (0, 0, left, max(self.offsets)))
        if only is None:
            taps = [padded[:, left + offset : left + offset + length] for offset in self.offsets]
        else:
            taps = [padded[:, only + (left + offset)] for offset in self.offsets]
            features = features[:, only]
        update: Tensor = self.dropout(F.glu(self.linear(torch.cat(taps, dim=-1)), dim=-1))
        return features + update
