"""Backbones that must be refused."""

import torch
from torch import nn

from dflows.backbones import Backbone


class _Plain(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, width)


class Shortening(_Plain):
    def forward(self, features):
        return self.linear(features)[:, 1:]


class Mixing(_Plain):
    def forward(self, features):
        return self.linear(features - features.mean(dim=0))


class Failing(_Plain):
    def forward(self, features):
        return self.linear(features.T)


class Leaking(Backbone):
    """Says that it is level-causal and is not."""

    def __init__(self, width: int = 8):
        super().__init__(width, level_causal=True)
        self.linear = nn.Linear(width, width)

    def forward(self, content, query=None, levels=None):
        return query + torch.tanh(self.linear(content.roll(-1, dims=1)))
