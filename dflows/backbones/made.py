"""MADE: a multilayer perceptron over the whole window, masked to keep to an ordering."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.arguments import check_layers, check_positive
from dflows.backbones.backbone import Backbone
from dflows.backbones.checks import check_causal, check_length

__all__ = ["MADE"]


class MADE(Backbone):
    r"""Creates a level-causal multilayer perceptron over the content of all dimensions at once.

    Hidden unit :math:`i` has a degree :math:`m_i`. The degrees spread evenly over the levels that
    others may see, and weights are masked so that a path leads from dimension :math:`e` to
    :math:`d` only over rising degrees:

    .. math:: \ell_e \le m_i \le m_j < \ell_d

    The masks follow from the levels of each call, so that one network serves every ordering. The
    last layer adds the query and mixes the features of each dimension.

    Args:
        width: Features of one dimension.
        length: D, the largest number of dimensions, context included.
        hidden: Hidden units of a layer; give several for every level.
        layers: Number of hidden layers.

    Raises:
        UserError: If a size is below 1.

    References:
        | MADE: Masked Autoencoder for Distribution Estimation (Germain et al., 2015)
        | https://arxiv.org/abs/1502.03509

    Example:
        >>> backbone = MADE(width=8, length=5, hidden=32)
        >>> content, query = torch.randn(3, 5, 8), torch.randn(5, 8)
        >>> backbone(content, query, levels=torch.tensor([0, 1, 0, 2, 1])).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, length: int, hidden: int = 512, layers: int = 2) -> None:
        super().__init__(width, level_causal=True)
        check_layers(layers=layers)
        check_positive(length=length, hidden=hidden)
        self.length = length
        self.first = nn.Linear(length * width, hidden)
        between = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.between = cast("Sequence[nn.Linear]", between)
        self.last = nn.Linear(hidden, length * width)
        self.query = nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(width, width)

    def extra_repr(self) -> str:
        return f"width={self.width}, length={self.length}"

    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        query, levels = check_causal(self, content, query, levels)
        length = content.shape[1]
        check_length(self, length, self.length)
        lowest, hidden = levels.min(), self.first.out_features
        count = (levels.max() - lowest).clamp(min=1)
        degrees = lowest + torch.arange(hidden, device=levels.device) * count // hidden

        mask = levels <= degrees.unsqueeze(-1)
        weight = self.first.weight.unflatten(1, (self.length, -1))[:, :length]
        weight = (weight * mask.unsqueeze(-1)).flatten(1)
        h = F.linear(content.flatten(1), weight, self.first.bias)
        for layer in self.between:
            mask = degrees <= degrees.unsqueeze(-1)
            h = F.linear(F.gelu(h), layer.weight * mask, layer.bias)
        mask = degrees < levels.unsqueeze(-1)
        weight = self.last.weight.unflatten(0, (self.length, -1))[:length]
        weight = (weight * mask.unsqueeze(1)).flatten(0, 1)
        h = F.linear(F.gelu(h), weight, self.last.bias[: length * self.width])
        features: Tensor = self.mix(F.gelu(h.unflatten(-1, (length, -1)) + self.query(query)))
        return features
