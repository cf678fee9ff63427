"""A Transformer whose attention keeps to an ordering, or looks everywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.acceleration import accelerated
from dflows.arguments import check_dropout, check_positive
from dflows.backbones.backbone import SteppedBackbone
from dflows.backbones.checks import check_causal, check_features, check_length, check_next_level
from dflows.errors import UserError
from dflows.remembered import Remembered

__all__ = ["Transformer"]

STEEPEST, SHALLOWEST = 1.0, 0.03


def rotation(positions: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Returns the cosines and signed sines (2, D, 1, features) that turn features at positions."""
    exponents = torch.arange(0, features, 2, device=positions.device) / features
    precise = torch.promote_types(dtype, torch.float32)
    angles = positions.to(precise).unsqueeze(-1) * torch.exp(-log(10000.0) * exponents.to(precise))
    cosines = torch.cat([angles.cos(), angles.cos()], dim=-1)
    sines = torch.cat([-angles.sin(), angles.sin()], dim=-1)
    return torch.stack([cosines, sines]).unsqueeze(-2).to(dtype)


def rotate(features: Tensor, turn: Tensor | None) -> Tensor:
    """Turns features (B, D, heads, features) pairwise, the first half against the second."""
    if turn is None:
        return features
    cosines, sines = turn.to(features.dtype)
    return torch.addcmul(features * cosines, features.roll(features.shape[-1] // 2, -1), sines)


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

    def remember(self, memory: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the keys and values (B, heads, D, features) of a normed memory (B, D, width)."""
        keys, values = self.key_value(memory).unflatten(-1, (2 * self.heads, -1)).chunk(2, dim=-2)
        return rotate(keys, turn).transpose(1, 2), values.transpose(1, 2)

    def remember_content(
        self, h: Tensor, content: Tensor, turn: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of a stream (B, D, width) once its content is known."""
        return self.remember(self.content_norm(h + self.content(content)), turn)

    def attend(
        self,
        h: Tensor,
        normed: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        turn: Tensor | None,
    ) -> Tensor:
        """Updates a stream h (B, D, width) by what its normed self finds in keys and values.

        The mask is added to the scores, or says where they count, (D, S) or (heads, D, S).
        """
        queries = rotate(self.query(normed).unflatten(-1, (self.heads, -1)), turn).transpose(1, 2)
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
        turn: Tensor | None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Updates a stream h (B, D, width) in one pass; of it the dimensions `only`, if given."""
        normed = self.norm(h)
        if content is None:
            keys, values = self.remember(normed, turn)
        else:
            keys, values = self.remember_content(h, content, turn)
        if only is not None:
            h, normed = h[:, only], normed[:, only]
            mask = None if mask is None else mask[..., only, :]
            turn = None if turn is None else turn[:, only]
        return self.attend(h, normed, keys, values, mask, turn)


class Transformer(SteppedBackbone):
    r"""Creates a pre-norm Transformer, level-causal or seeing everything.

    With ``attention="causal"`` a stream per dimension starts from the query and never takes up the
    content of its own dimension. In a layer it asks the dimensions of strictly lower level, whose
    keys and values are computed from stream and content together, and one start token that is
    always there (so that level 0 sees something):

    .. math:: K_e, V_e = W \, \operatorname{norm}(h_e + P y_e), \quad
        h_d \leftarrow h_d + \operatorname{attention}(h_d; K_e, V_e : \ell_e < \ell_d)

    Every ordering is served this way, levels of several dimensions included. With
    ``attention="full"`` it is the usual encoder.

    Matrices start at the scale of GPT-2, those that end on a residual branch smaller by the square
    root of the number of branches, so that 64 layers train.

    Args:
        width: Features of one dimension.
        layers: Number of layers.
        heads: Number of heads; they share the width.
        attention: ``causal`` keeps to the levels, ``full`` sees all dimensions.
        positions: How a dimension knows where it is: ``rotary``, ``learned`` (an embedding added
            to the input), ``layers`` (one added to the input of every layer) or ``none``.
        length: D, the largest number of dimensions, context included. Needed by learned positions
            and by locality.
        locality: ``distance`` adds to the scores a bias learned for every head and distance, which
            starts at -slope·distance. Context and the start token are at no distance.
        dropout: Probability that an attention weight or a feature of an update is dropped.
        feedforward: Hidden units of the feed-forward network, in multiples of the width.

    Raises:
        UserError: If the width does not divide into heads, or the length is missing.

    References:
        | Attention Is All You Need (Vaswani et al., 2017)
        | https://arxiv.org/abs/1706.03762
        | Language Models are Unsupervised Multitask Learners (Radford et al., 2019)
        | RoFormer: Enhanced Transformer with Rotary Position Embedding (Su et al., 2021)
        | https://arxiv.org/abs/2104.09864
        | Character-Level Language Modeling with Deeper Self-Attention (Al-Rfou et al., 2018), for
          positions at every layer
        | https://arxiv.org/abs/1808.04444
        | XLNet: Generalized Autoregressive Pretraining (Yang et al., 2019), for the query stream
        | https://arxiv.org/abs/1906.08237

    Example:
        >>> backbone = Transformer(width=8, layers=2, heads=2)
        >>> content, query = torch.randn(3, 5, 8), torch.randn(5, 8)
        >>> backbone(content, query, levels=torch.tensor([0, 1, 0, 2, 1])).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        width: int,
        layers: int = 2,
        heads: int = 4,
        *,
        attention: Literal["causal", "full"] = "causal",
        positions: Literal["rotary", "learned", "layers", "none"] = "rotary",
        length: int | None = None,
        locality: Literal["distance"] | None = None,
        dropout: float = 0.0,
        feedforward: int = 4,
    ) -> None:
        if attention not in ("causal", "full"):
            raise UserError(f"attention is {attention!r}: give 'causal' or 'full'")
        super().__init__(width, level_causal=attention == "causal")
        check_positive(layers=layers, heads=heads, feedforward=feedforward)
        check_dropout(dropout)
        if width % heads:
            raise UserError(f"width={width} does not divide into heads={heads} equal parts")
        if positions not in ("rotary", "learned", "layers", "none"):
            raise UserError(
                f"positions is {positions!r}: give 'rotary', 'learned', 'layers' or 'none'"
            )
        if positions == "rotary" and (width // heads) % 2:
            raise UserError(
                f"rotary positions turn features in pairs, and a head has {width // heads}: "
                "choose width and heads so that it has an even number"
            )
        if locality not in (None, "distance"):
            raise UserError(f"locality is {locality!r}: give 'distance' or nothing")
        if length is not None:
            check_positive(length=length)
        elif positions in ("learned", "layers") or locality is not None:
            raise UserError(
                "learned positions and locality have parameters by place: give `length`"
            )
        self.heads = heads
        self.positions = positions
        learned = positions in ("learned", "layers")
        self.length = length if learned or locality is not None else None
        reach = length if locality == "distance" else None
        blocks = nn.ModuleList(
            Block(width, heads, feedforward * width, dropout, self.level_causal, reach)
            for _ in range(layers)
        )
        self.blocks = cast("Sequence[Block]", blocks)
        self.norm = nn.LayerNorm(width)
        scale = 0.02 * (768 / width) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "locality" not in name:
                branch = name.endswith(("merge.weight", "contract.weight"))
                nn.init.normal_(parameter, std=scale * (2 * layers) ** -0.5 if branch else scale)
            elif name.endswith("bias") and "locality" not in name:
                nn.init.zeros_(parameter)
        self._stages = Remembered(stages)
        if self.level_causal:
            self.start = nn.Parameter(torch.randn(width))
        if learned:
            number = layers if positions == "layers" else 1
            self.position = nn.Parameter(torch.randn(number, length or 0, width) * scale)

    def extra_repr(self) -> str:
        attention = "causal" if self.level_causal else "full"
        return (
            f"width={self.width}, attention={attention!r}, positions={self.positions!r}, "
            f"length={self.length}"
        )

    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        if self.level_causal:
            return self._causal(content, *check_causal(self, content, query, levels))
        return self._full(content)

    def features_at(
        self,
        dimensions: Tensor,
        content: Tensor,
        query: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Tensor:
        if self.level_causal:
            return super().features_at(dimensions, content, query, levels)
        return self._full(content, dimensions)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def layer_features(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> list[Tensor]:
        """Computes the features after every layer.

        Args:
            content: As in :meth:`forward`.
            query: As in :meth:`forward`.
            levels: As in :meth:`forward`.

        Returns:
            Features (B, D, width) after every layer; only those of the last, which are those of
            :meth:`forward`, have passed the final norm.
        """
        if self.level_causal:
            layers = self._causal_layers(content, *check_causal(self, content, query, levels))
            *earlier, last = (h[:, 1:] for h in layers)
        else:
            *earlier, last = self._full_layers(content)
        return [*earlier, self.norm(last)]

    def _full(self, content: Tensor, only: Tensor | None = None) -> Tensor:
        h = content
        for layer in self._full_layers(content, only):
            h = layer
        normed: Tensor = self.norm(h)
        return normed

    def _full_layers(self, content: Tensor, only: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the features (B, D, width) after every layer; of the last those of `only`."""
        check_features(self, content)
        h, places = content, self._places(content.shape[1])
        turn = self._turn(torch.arange(content.shape[1], device=content.device), content.dtype)
        for n, block in enumerate(self.blocks):
            mask = None if block.locality is None else block.locality(content.shape[1])
            last = n + 1 == len(self.blocks)
            h = block(placed(h, places, n), None, mask, turn, only if last else None)
            yield h

    def _causal(self, content: Tensor, query: Tensor, levels: Tensor) -> Tensor:
        h = content
        for layer in self._causal_layers(content, query, levels):
            h = layer
        normed: Tensor = self.norm(h[:, 1:])
        return normed

    def _causal_layers(self, content: Tensor, query: Tensor, levels: Tensor) -> Iterator[Tensor]:
        """Yields the streams (B, 1 + D, width) of start and dimensions after every layer."""
        h = self._streams(query).expand(content.shape[0], -1, -1)
        places = self._places(content.shape[1], start=1)
        content = F.pad(content, (0, 0, 1, 0))
        levels = F.pad(levels, (1, 0), value=-2)
        visible = levels < levels.unsqueeze(-1)
        visible[0, 0] = True
        turn = self._turn(torch.arange(len(levels), device=levels.device), query.dtype)
        for n, block in enumerate(self.blocks):
            mask = self._mask(block.locality, levels, visible)
            h = block(placed(h, places, n), content, mask, turn)
            yield h

    def _streams(self, query: Tensor) -> Tensor:
        """Returns what the streams of start and dimensions begin with, (…, 1 + D, width)."""
        return torch.cat([self.start.expand(*query.shape[:-2], 1, -1), query], dim=-2)

    def _places(self, length: int, start: int = 0) -> Tensor | None:
        """Returns what the first layers add to dimensions (layers, start + D, width)."""
        if self.length is not None:
            check_length(self, length, self.length)
        if self.positions not in ("learned", "layers"):
            return None
        return F.pad(self.position[:, :length], (0, 0, start, 0))

    def _turn(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        if self.positions != "rotary":
            return None
        return rotation(positions, self.width // self.heads, dtype)

    def _mask(self, locality: nn.Module | None, levels: Tensor, visible: Tensor) -> Tensor:
        """Returns the mask (1 + D, 1 + D) or (heads, 1 + D, 1 + D) of start and dimensions."""
        if locality is None:
            return visible
        bias = F.pad(locality(len(levels) - 1), (1, 0, 1, 0))
        return bias.masked_fill(levels < 0, 0).masked_fill(~visible, -torch.inf)

    @torch.no_grad()
    def begin(self, query: Tensor, levels: Tensor, batch_size: int) -> "Cache":
        if not self.level_causal:
            raise UserError("a Transformer of full attention has no steps: set attention='causal'")
        check_causal(self, query.expand(batch_size, -1, -1), query, levels)
        levels, order, counts = self._stages(levels)
        everything = torch.ones(len(order), len(order), dtype=torch.bool, device=levels.device)
        masks: list[Tensor | None] = []
        for block in self.blocks:
            mask = None
            if block.locality is not None:
                mask = self._mask(block.locality, levels, everything)[:, order][:, :, order]
            masks.append(mask)
        h = self._streams(query)[..., order, :].expand(batch_size, -1, -1)
        turn, places = self._turn(order, query.dtype), self._places(len(order) - 1, start=1)
        places = None if places is None else places[:, order]
        cache = Cache(counts, stream=h, turn=turn, places=places, masks=masks)
        start, turn = h[:, :1], cache.turned(0, 1)
        for n, (block, mask) in enumerate(zip(self.blocks, masks, strict=True)):
            keys, values = block.remember_content(start, torch.zeros_like(start), turn)
            cache.keep(n, 0, keys, values)
            own = None if mask is None else mask[:, :1, :1]
            start = block.attend(start, block.norm(start), keys, values, own, turn)
        self._stage(cache, None)
        return cache

    @torch.no_grad()
    def advance(self, cache: "Cache", level: int, content: Tensor | None) -> Tensor:
        shape = [cache.stream.shape[0], cache.counts[cache.stage - 1], self.width]
        check_next_level(level, cache.stage - 1, content, shape)
        if cache.stage >= len(cache.counts):
            raise UserError(f"level {level} was asked for, and there are {level} levels")
        normed: Tensor = self.norm(self._stage(cache, content))
        return normed

    def _stage(self, cache: "Cache", content: Tensor | None) -> Tensor:
        """Adds the content of the last stage to the cache and runs the rows of the next."""
        attend = accelerated(Block.attend)
        remember_content = accelerated(Block.remember_content)
        begin = cache.known
        end = begin + (0 if content is None else content.shape[1])
        stop = end + cache.counts[cache.stage]
        inputs, h = [], cache.stream[:, end:stop].contiguous()
        places = None if cache.places is None else cache.places[:, end:stop]
        for n, (block, mask) in enumerate(zip(self.blocks, cache.masks, strict=True)):
            h = placed(h, places, n)
            if content is not None and end > begin:
                turn = cache.turned(begin, end)
                keys, values = remember_content(block, cache.inputs[n], content, turn)
                cache.keep(n, begin, keys, values)
            inputs.append(h)
            if stop > end:
                keys, values = cache.keys[n][:, :, :end], cache.values[n][:, :, :end]
                seen = None if mask is None else mask[:, end:stop, :end]
                turn = cache.turned(end, stop)
                h = attend(block, h, block.norm(h), keys, values, seen, turn)
        cache.inputs = inputs
        cache.known = end
        cache.stage += 1
        return h


def placed(h: Tensor, places: Tensor | None, layer: int) -> Tensor:
    """Adds to the input of a layer what stands for places (layers, D, width), if it has any."""
    return h if places is None or layer >= len(places) else h + places[layer]


def stages(levels: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Sorts the rows of start and dimensions into stages.

    Args:
        levels: Levels (D,), -1 for context.

    Returns:
        Levels (1 + D,) with -2 for the start; its rows by level (1 + D,); and how many rows the
        context has, and every level.
    """
    counts = (levels + 1).bincount().tolist()
    levels = F.pad(levels, (1, 0), value=-2)
    return levels, levels.argsort(stable=True), counts


@dataclass
class Cache:
    """What a Transformer remembers of the levels that it has computed.

    Rows are sorted by level, the start token first, so that what a level may see is a slice.

    Attributes:
        counts: Rows of the context, and of every level.
        stream: What the streams start from (B, 1 + D, width).
        turn: Cosines and sines of rotary positions, or None.
        places: What the first layers add for places (layers, 1 + D, width), or None.
        masks: Bias of every layer (heads, 1 + D, 1 + D), or None.
        keys: Keys of every layer (B, heads, 1 + D, features), allocated when first needed.
        values: Likewise the values.
        inputs: Input of every layer (B, n, width) for the stage that ran last.
        known: Rows whose keys and values are there.
        stage: Which of `counts` is next.
    """

    counts: list[int]
    stream: Tensor
    turn: Tensor | None
    places: Tensor | None
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

    def turned(self, begin: int, end: int) -> Tensor | None:
        """Returns the rotation of some rows."""
        return None if self.turn is None else self.turn[:, begin:end]
