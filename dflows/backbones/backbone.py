"""The interfaces of backbones: networks that turn conditioning dimensions into features."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dflows.arguments import check_positive

__all__ = ["Backbone", "State", "StatefulBackbone", "SteppedBackbone"]

State: TypeAlias = tuple[Tensor, ...]
"""The state of a stateful backbone: tensors (…, B, features)."""


class Backbone(nn.Module, ABC):
    """A network from features (B, D, width) to features (B, D, width).

    It embeds no values and has no head; the conditioner brings both. There are two kinds:

    - *Level-causal* (``level_causal`` is true), called as ``backbone(content, query, levels)``.
      The content (B, D, width) embeds the values; the query (D, width) embeds what is known of a
      dimension beforehand, such as its level; the levels (D,) are integers. Where a
      context is aligned with the dimensions, each example has its own query, (B, D, width). The
      output at dimension d depends only on the content of dimensions of a level strictly below
      ``levels[d]``, hence never on its own, and on any row of the query. Dimensions of level 0 see
      no content.
    - Others, called as ``backbone(features)``, mix the dimensions freely. The conditioner masks
      beforehand what they must not see. A module that is not derived from this class joins them
      by :class:`~dflows.backbones.Masked`.

    A level-causal backbone receives a context that is not aligned as further dimensions *in front*,
    of level -1: they are visible to all others, their query is zero, and their output is ignored.

    D may differ from call to call: the last window of a text is shorter. A backbone that has
    parameters for every position takes up to ``length`` dimensions, context included.

    Args:
        width: Features of one dimension, in and out.
        level_causal: Which of the two kinds it is.

    Attributes:
        embeds: Whether the caller embeds the content, as everywhere but in
            :class:`~dflows.backbones.Table`, which takes the values themselves.
        knows_positions: Whether it distinguishes positions by itself. To the features of a
            backbone that does not, the conditioner adds a learned embedding of positions.
        knows_levels: Whether it distinguishes levels by itself, so that it serves orderings of any
            number of levels. For a backbone that does not, the query has a learned embedding of
            levels.
        checkpoints_gradients: Whether it can do without what its layers have computed until the
            gradient needs it: it runs them by :meth:`run_layer`.
        gradient_checkpointing: Whether it does, which takes less memory in training, and more time.

    Raises:
        UserError: If the width is below 1.
    """

    embeds: ClassVar[bool] = True
    knows_positions: ClassVar[bool] = True
    knows_levels: bool = False
    checkpoints_gradients: ClassVar[bool] = False
    gradient_checkpointing: bool = False
    width: int
    level_causal: bool

    def __init__(self, width: int, *, level_causal: bool) -> None:
        super().__init__()
        check_positive(width=width)
        self.width = width
        self.level_causal = level_causal

    @property
    def display_name(self) -> str:
        """Its name in messages."""
        return type(self).__name__

    @property
    def num_layers(self) -> int:
        """Number of layers whose features :meth:`layer_features` gives."""
        return 1

    @abstractmethod
    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        """Computes the features of every dimension.

        Args:
            content: Content, or features where the backbone is not level-causal (B, D, width).
            query: Query (D, width) or (B, D, width) of a level-causal backbone.
            levels: Levels (D,) of a level-causal backbone, 0, 1, 2, … and -1 for context.

        Returns:
            Features (B, D, width).

        Raises:
            UserError: If there are more dimensions than the backbone can take, or the shapes do not
                fit.
        """

    def run_layer(self, layer: nn.Module, *arguments: Tensor | None) -> Tensor:
        """Computes a layer, a second time for the gradient where that is chosen.

        Both times it drops the same features, and computes in the same precision.

        Args:
            layer: The layer, one of several that are alike.
            arguments: Its arguments.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            computed: Tensor = checkpoint(layer, *arguments, use_reentrant=False)
            return computed
        features: Tensor = layer(*arguments)
        return features

    def features_at(
        self,
        dimensions: Tensor,
        content: Tensor,
        query: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Tensor:
        """Computes the features of some dimensions, which generation asks for level by level.

        Override it where work for other dimensions can be saved.

        Args:
            dimensions: Indices (n,) of the dimensions, counting those of a context.
            content: As in :meth:`forward`.
            query: As in :meth:`forward`.
            levels: As in :meth:`forward`.

        Returns:
            Features (B, n, width), those of :meth:`forward` at these dimensions.
        """
        features: Tensor = self(content, query, levels)
        return features[:, dimensions]

    def layer_features(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> list[Tensor]:
        """Computes the features after every layer, for losses that look at them.

        They depend on what the features of :meth:`forward` depend on.

        Args:
            content: As in :meth:`forward`.
            query: As in :meth:`forward`.
            levels: As in :meth:`forward`.

        Returns:
            Features (B, D, width) after each of the :attr:`num_layers` layers; the last are those
            of :meth:`forward`.
        """
        return [self(content, query, levels)]


class SteppedBackbone(Backbone):
    """A level-causal backbone that can also compute one level after the other.

    Generation samples the values of a level and then needs the features of the next one. Evaluating
    the whole network for every level repeats the work of the earlier ones; a stepped backbone keeps
    it in a cache. The steps give what one evaluation of all levels gives::

        cache = backbone.begin(query, levels, batch_size)
        features = backbone.advance(cache, 0, None)  # (B, n0, width)
        features = backbone.advance(cache, 1, content_of_level_0)  # (B, n1, width)
        ...

    Both run without gradients.
    """

    @property
    def steps(self) -> bool:
        """Whether this one, as configured, is level-causal and hence offers the steps."""
        return self.level_causal

    @abstractmethod
    def begin(self, query: Tensor, levels: Tensor, batch_size: int) -> Any:
        """Prepares a cache for one batch.

        Args:
            query: Query (D, width) or (B, D, width).
            levels: Levels (D,), without a gap; -1 for context.
            batch_size: B.

        Returns:
            The cache, an opaque argument of :meth:`advance`.

        Raises:
            UserError: If the backbone cannot follow these levels.
        """

    @abstractmethod
    def advance(self, cache: Any, level: int, content: Tensor | None) -> Tensor:
        """Computes the features of one level and adds to the cache.

        Args:
            cache: What :meth:`begin` returned; it is changed in place.
            level: The level, 0 at first and one more with every call.
            content: The content (B, n, width) of the n dimensions of the level before, in the order
                of their indices; at level 0 that of the context, or None where there is none.

        Returns:
            The features (B, m, width) of the m dimensions of this level, in the order of their
            indices.

        Raises:
            UserError: If a level is left out or done twice, or the content does not fit.
        """


class StatefulBackbone(SteppedBackbone):
    """A stepped backbone that can continue in one window where it ended in another.

    It reads the dimensions in order, and remembers them in a state of fixed size. A language model
    trains on a text window by window and passes the state on (truncated back-propagation through
    time).

    Attributes:
        start: The content before the first dimension, a parameter (width,).
    """

    start: nn.Parameter

    @property
    @abstractmethod
    def stateful(self) -> bool:
        """Whether this one, as configured, reads from left to right and can hand its state on."""

    @abstractmethod
    def resume(
        self,
        content: Tensor,
        query: Tensor,
        levels: Tensor,
        before: Tensor,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        """Computes the features of windows that continue where others ended.

        Args:
            content: Content (B, D, width).
            query: Query (D, width) or (B, D, width).
            levels: Levels (D,), those of the natural ordering.
            before: Content (B, width) of the dimension before the first; :attr:`start` for windows
                where a text starts.
            state: The state after that dimension, tensors (…, B, features); zeros, the state of
                windows where a text starts, by default.

        Returns:
            Features (B, D, width), and the state after the last dimension.

        Raises:
            UserError: If the backbone reads in another direction, or the shapes do not fit.
        """
