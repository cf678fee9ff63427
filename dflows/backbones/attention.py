"""A layer of a Transformer, and the cache of keys and values that its steps share."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.backbones.rotary import rotate

__all__ = ["Block", "KeyValueCache", "Locality"]

STEEPEST, SHALLOWEST = 1.0, 0.03


class Locality(nn.Module):
    """Creates an attention bias learned for every head and distance, started at -slope·distance.

    The slopes of the heads fall geometrically from 1 to 0.03, so that some heads start with their
    neighbours and others with the whole window. Left and right have entries of their own.

    Args:
        heads: Number of heads.
        length: D, the largest number of dimensions.

    References:
        | Train Short, Test Long (Press et al., 2022)
        | https://arxiv.org/abs/2108.12409
    """

    def __init__(self, heads: int, length: int) -> None:
        super().__init__()
        self.length = length
        slopes = STEEPEST * (SHALLOWEST / STEEPEST) ** torch.linspace(0, 1, heads)
        distances = torch.arange(1 - length, length).abs()
        self.bias = nn.Parameter(-slopes.unsqueeze(-1) * distances)

    def forward(self, length: int) -> Tensor:
        """Returns the bias (heads, length, length) of query and key."""
        offsets = self.bias[:, self.length - length : self.length + length - 1]
        return offsets.unfold(1, length, 1).flip(1)


class Block(nn.Module):
    """Creates one layer: attention and a feed-forward network, each on a residual branch.

    Args:
        width: Features of one dimension.
        heads: Number of heads.
        hidden: Hidden units of the feed-forward network.
        dropout: Probability that an attention weight or a feature of an update is dropped.
        level_causal: Whether content comes apart from the stream.
        locality: Length of a learned bias by distance, or None.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        level_causal: bool,
        locality: int | None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = dropout
        self.norm = nn.LayerNorm(width)
        if level_causal:
            self.content = nn.Linear(width, width, bias=False)
            self.content_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.merge = nn.Linear(width, width)
        self.locality = None if locality is None else Locality(heads, locality)
        self.feedforward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def remember(self, memory: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the keys and values (B, heads, D, features) of a normed memory (B, D, width)."""
        keys, values = self.key_value(memory).unflatten(-1, (2 * self.heads, -1)).chunk(2, dim=-2)
        return rotate(keys, rotary).transpose(1, 2), values.transpose(1, 2)

    def remember_content(
        self, h: Tensor, content: Tensor, rotary: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of a stream (B, D, width) once its content is known."""
        return self.remember(self.content_norm(h + self.content(content)), rotary)

    def attend(
        self,
        h: Tensor,
        normed: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        rotary: Tensor | None,
    ) -> Tensor:
        """Updates a stream h (B, D, width) by what its normed self finds in keys and values.

        The mask is added to the scores, or says where they count, (D, S) or (heads, D, S).
        """
        queries = rotate(self.query(normed).unflatten(-1, (self.heads, -1)), rotary).transpose(1, 2)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(queries.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(queries, keys, values, mask, dropout_p=dropout)
        h = h + self.dropout(self.merge(found.transpose(1, 2).flatten(-2)))
        hidden = F.gelu(self.expand(self.feedforward_norm(h)))
        return h + self.dropout(self.contract(hidden))

    def forward(
        self,
        h: Tensor,
        content: Tensor | None,
        mask: Tensor | None,
        rotary: Tensor | None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Updates a stream h (B, D, width) in one pass; of it the dimensions `only`, if given."""
        normed = self.norm(h)
        if content is None:
            keys, values = self.remember(normed, rotary)
        else:
            keys, values = self.remember_content(h, content, rotary)
        if only is not None:
            h, normed = h[:, only], normed[:, only]
            mask = None if mask is None else mask[..., only, :]
            rotary = None if rotary is None else rotary[:, only]
        return self.attend(h, normed, keys, values, mask, rotary)


@dataclass
class KeyValueCache:
    """What a Transformer remembers of the levels that it has computed.

    Rows are sorted by level, the start token first, so that what a level may see is a slice.

    Attributes:
        counts: Rows of the context, and of every level.
        stream: What the streams start from (B, 1 + D, width).
        rotary: Cosines and sines (2, 1 + D, 1, features) of rotary positions, or None.
        positions: What the first layers add for positions (layers, 1 + D, width), or None.
        masks: Bias of every layer (heads, 1 + D, 1 + D), or None.
        keys: Keys of every layer (B, heads, 1 + D, features), allocated when first needed.
        values: Likewise the values.
        inputs: Input of every layer (B, n, width) for the stage that ran last.
        known: Rows whose keys and values are there.
        stage: Which of `counts` is next.
    """

    counts: list[int]
    stream: Tensor
    rotary: Tensor | None
    positions: Tensor | None
    masks: list[Tensor | None]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    known: int = 1
    stage: int = 0

    def keep(self, layer: int, begin: int, keys: Tensor, values: Tensor) -> None:
        """Stores the keys and values (B, heads, n, features) of n rows of one layer."""
        if len(self.keys) == layer:
            batch, heads, _, features = keys.shape
            shape = (batch, heads, self.stream.shape[1], features)
            self.keys.append(keys.new_empty(shape))
            self.values.append(values.new_empty(shape))
        self.keys[layer][:, :, begin : begin + keys.shape[2]] = keys
        self.values[layer][:, :, begin : begin + keys.shape[2]] = values

    def rotary_of(self, begin: int, end: int) -> Tensor | None:
        """Returns the cosines and sines of some rows."""
        return None if self.rotary is None else self.rotary[:, begin:end]
