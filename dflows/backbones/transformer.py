"""A Transformer whose attention keeps to an ordering, or looks everywhere."""

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.acceleration import accelerated
from dflows.arguments import check_dimensions, check_dropout, check_layers, check_positive
from dflows.backbones.attention import Block, KeyValueCache
from dflows.backbones.backbone import SteppedBackbone
from dflows.backbones.checks import check_causal, check_features, check_length, check_next_level
from dflows.backbones.lanes import LaneDistances
from dflows.backbones.rotary import rotary_table
from dflows.errors import UserError
from dflows.remembered import Remembered

__all__ = ["Transformer"]

Positions: TypeAlias = Literal["rotary", "lanes", "learned", "layers", "none"]
ROTARY = ("rotary", "lanes")

OF_LANES = ("a Transformer of positions='lanes' reads along them", "or set positions='rotary'")
FEEDFORWARD = 4
"""Hidden units of the feed-forward network, in multiples of the width."""


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
            to the input), ``layers`` (one added to the input of every layer) or ``none``. With
            ``lanes``, beside rotary ones, it knows how far it is from the head of its lane and
            from what is known ahead: one network then serves any number of levels, over Natural,
            Reversed and :class:`~dflows.orderings.Strided`.
        length: D, the largest number of dimensions, context included. Needed by learned positions
            and by locality.
        locality: ``distance`` adds to the scores a bias learned for every head and distance, which
            starts at -slope·distance. Context and the start token are at no distance.
        dropout: Probability that an attention weight or a feature of an update is dropped.

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

    checkpoints_gradients = True

    def __init__(
        self,
        width: int,
        layers: int = 2,
        heads: int = 4,
        *,
        attention: Literal["causal", "full"] = "causal",
        positions: Positions = "rotary",
        length: int | None = None,
        locality: Literal["distance"] | None = None,
        dropout: float = 0.0,
    ) -> None:
        if attention not in ("causal", "full"):
            raise UserError(f"attention is {attention!r}: give 'causal' or 'full'")
        super().__init__(width, level_causal=attention == "causal")
        check_layers(layers=layers)
        check_positive(heads=heads)
        check_dropout(dropout)
        if width % heads:
            raise UserError(f"width={width} does not divide into heads={heads} equal parts")
        if positions not in get_args(Positions):
            raise UserError(
                f"positions is {positions!r}: give 'rotary', 'lanes', 'learned', 'layers' or 'none'"
            )
        if positions == "lanes" and not self.level_causal:
            raise UserError(
                "full attention sees all dimensions and has no lanes: set attention='causal', or "
                "positions='rotary'"
            )
        if positions in ROTARY and (width // heads) % 2:
            raise UserError(
                f"rotary positions rotate features in pairs, and a head has {width // heads}: "
                "choose width and heads so that it has an even number"
            )
        if locality not in (None, "distance"):
            raise UserError(f"locality is {locality!r}: give 'distance' or nothing")
        if length is not None:
            check_dimensions(length)
        elif positions in ("learned", "layers") or locality is not None:
            raise UserError(
                "learned positions and locality have parameters for every position: give `length`"
            )
        self.heads = heads
        self.positions = positions
        learned = positions in ("learned", "layers")
        self.length = length if learned or locality is not None else None
        reach = length if locality == "distance" else None
        blocks = nn.ModuleList(
            Block(width, heads, FEEDFORWARD * width, dropout, self.level_causal, reach)
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
        self.knows_levels = positions == "lanes"
        self.lanes = LaneDistances(width, *OF_LANES) if self.knows_levels else None
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
        h, positions = content, self._position_embedding(content.shape[1])
        rotary = self._rotary(torch.arange(content.shape[1], device=content.device), content.dtype)
        for n, block in enumerate(self.blocks):
            mask = None if block.locality is None else block.locality(content.shape[1])
            last = n + 1 == len(self.blocks)
            h = add_positions(h, positions, n)
            h = self.run_layer(block, h, None, mask, rotary, only if last else None)
            yield h

    def _causal(self, content: Tensor, query: Tensor, levels: Tensor) -> Tensor:
        h = content
        for layer in self._causal_layers(content, query, levels):
            h = layer
        normed: Tensor = self.norm(h[:, 1:])
        return normed

    def _causal_layers(self, content: Tensor, query: Tensor, levels: Tensor) -> Iterator[Tensor]:
        """Yields the streams (B, 1 + D, width) of start and dimensions after every layer."""
        h = self._streams(query, levels).expand(content.shape[0], -1, -1)
        positions = self._position_embedding(content.shape[1], start=1)
        content = F.pad(content, (0, 0, 1, 0))
        levels = F.pad(levels, (1, 0), value=-2)
        visible = levels < levels.unsqueeze(-1)
        visible[0, 0] = True
        rotary = self._rotary(torch.arange(len(levels), device=levels.device), query.dtype)
        for n, block in enumerate(self.blocks):
            mask = self._mask(block.locality, levels, visible)
            h = self.run_layer(block, add_positions(h, positions, n), content, mask, rotary)
            yield h

    def _streams(self, query: Tensor, levels: Tensor) -> Tensor:
        """Returns what the streams of start and dimensions begin with, (…, 1 + D, width)."""
        if self.lanes is not None:
            query = query + self.lanes(levels)
        return torch.cat([self.start.expand(*query.shape[:-2], 1, -1), query], dim=-2)

    def _position_embedding(self, length: int, start: int = 0) -> Tensor | None:
        """Returns what the first layers add to dimensions (layers, start + D, width)."""
        if self.length is not None:
            check_length(self, length, self.length)
        if self.positions not in ("learned", "layers"):
            return None
        return F.pad(self.position[:, :length], (0, 0, start, 0))

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        if self.positions not in ROTARY:
            return None
        return rotary_table(positions, self.width // self.heads, dtype)

    def _mask(self, locality: nn.Module | None, levels: Tensor, visible: Tensor) -> Tensor:
        """Returns the mask (1 + D, 1 + D) or (heads, 1 + D, 1 + D) of start and dimensions.

        It is dense: one of booleans, shared by examples, heads and layers, takes 17 MB for 4,096
        dimensions, and PyTorch's fused attention takes it on every device. `flex_attention` would
        skip what is hidden, but is slower unless compiled, and trains on GPUs alone.
        """
        if locality is None:
            return visible
        bias = F.pad(locality(len(levels) - 1), (1, 0, 1, 0))
        return bias.masked_fill(levels < 0, 0).masked_fill(~visible, -torch.inf)

    @torch.no_grad()
    def begin(self, query: Tensor, levels: Tensor, batch_size: int) -> KeyValueCache:
        if not self.level_causal:
            raise UserError("a Transformer of full attention has no steps: set attention='causal'")
        check_causal(self, query.expand(batch_size, -1, -1), query, levels)
        streams = self._streams(query, levels)
        levels, order, counts = self._stages(levels)
        everything = torch.ones(len(order), len(order), dtype=torch.bool, device=levels.device)
        masks: list[Tensor | None] = []
        for block in self.blocks:
            mask = None
            if block.locality is not None:
                mask = self._mask(block.locality, levels, everything)[:, order][:, :, order]
            masks.append(mask)
        h = streams[..., order, :].expand(batch_size, -1, -1)
        rotary = self._rotary(order, query.dtype)
        positions = self._position_embedding(len(order) - 1, start=1)
        positions = None if positions is None else positions[:, order]
        cache = KeyValueCache(counts, stream=h, rotary=rotary, positions=positions, masks=masks)
        start, rotary = h[:, :1], cache.rotary_of(0, 1)
        for n, (block, mask) in enumerate(zip(self.blocks, masks, strict=True)):
            keys, values = block.remember_content(start, torch.zeros_like(start), rotary)
            cache.keep(n, 0, keys, values)
            own = None if mask is None else mask[:, :1, :1]
            start = block.attend(start, block.norm(start), keys, values, own, rotary)
        self._stage(cache, None)
        return cache

    @torch.no_grad()
    def advance(self, cache: KeyValueCache, level: int, content: Tensor | None) -> Tensor:
        shape = [cache.stream.shape[0], cache.counts[cache.stage - 1], self.width]
        check_next_level(level, cache.stage - 1, content, shape)
        if cache.stage >= len(cache.counts):
            raise UserError(f"level {level} was asked for, and there are {level} levels")
        normed: Tensor = self.norm(self._stage(cache, content))
        return normed

    def _stage(self, cache: KeyValueCache, content: Tensor | None) -> Tensor:
        """Adds the content of the last stage to the cache and runs the rows of the next."""
        attend = accelerated(Block.attend)
        remember_content = accelerated(Block.remember_content)
        begin = cache.known
        end = begin + (0 if content is None else content.shape[1])
        stop = end + cache.counts[cache.stage]
        inputs, h = [], cache.stream[:, end:stop].contiguous()
        positions = None if cache.positions is None else cache.positions[:, end:stop]
        for n, (block, mask) in enumerate(zip(self.blocks, cache.masks, strict=True)):
            h = add_positions(h, positions, n)
            if content is not None and end > begin:
                rotary = cache.rotary_of(begin, end)
                keys, values = remember_content(block, cache.inputs[n], content, rotary)
                cache.keep(n, begin, keys, values)
            inputs.append(h)
            if stop > end:
                keys, values = cache.keys[n][:, :, :end], cache.values[n][:, :, :end]
                seen = None if mask is None else mask[:, end:stop, :end]
                rotary = cache.rotary_of(end, stop)
                h = attend(block, h, block.norm(h), keys, values, seen, rotary)
        cache.inputs = inputs
        cache.known = end
        cache.stage += 1
        return h


def add_positions(h: Tensor, positions: Tensor | None, layer: int) -> Tensor:
    """Adds to the input of a layer its embedding of positions (layers, D, width), if it has one."""
    return h if positions is None or layer >= len(positions) else h + positions[layer]


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
