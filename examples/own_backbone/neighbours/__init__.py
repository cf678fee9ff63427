"""A backbone of one's own: any map of features (B, D, width) to features (B, D, width)."""

import torch
from torch import Tensor, nn


class Neighbours(nn.Module):
    """Creates a network that mixes every position with its neighbours.

    dflows hands it the positions that it may see and hides the others, so it need not be causal.

    Args:
        width: Features of one position.
        reach: How far a layer looks on both sides.
        layers: How many layers.
    """

    def __init__(self, width: int, reach: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.width = width  # by which dflows knows what features it takes
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 2 * reach + 1, padding=reach) for _ in range(layers)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (B, D, width) to features (B, D, width)."""
        for layer in self.layers:
            features = features + torch.tanh(layer(features.mT).mT)
        return features
