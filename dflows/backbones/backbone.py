"""What every backbone promises: the network that turns conditioning dimensions into features."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from dflows.errors import UserError

__all__ = ["Backbone", "SteppedBackbone"]

T = TypeVar("T")
MOST_REMEMBERED = 32


class Backbone(nn.Module, ABC):
    """Creates a network from features (B, D, width) to features (B, D, width).

    It embeds no values and has no head; whoever uses it brings both. There are two kinds:

    - *Level-causal* (``level_causal`` is true), called as ``backbone(content, query, levels)``.
      The content (B, D, width) says what the values are; the query (D, width) says what may be
      known of a dimension beforehand, its level for example; the levels (D,) are integers. Where a
      context is aligned with the dimensions, the query is one an example, (B, D, width). The
      output at dimension d depends on the content of dimensions of a level strictly below
      ``levels[d]`` only, hence never on its own, and on any row of the query. Dimensions of
      level 0 see no content.
    - Others, called as ``backbone(features)``, mix the dimensions as they like. Whoever calls one
      has masked beforehand what it may not see. Any module of this signature will do and need not
      be derived from this class, ``torch.nn.TransformerEncoder(..., batch_first=True)`` say.

    Context is handed to a level-causal backbone as further dimensions *in front*, of level -1:
    they are visible to all others, their query is zero, and the output there means nothing.

    D may differ from call to call: the last window of a text is shorter. A backbone that has
    parameters for every position takes up to ``length`` dimensions, context included.

    Arguments:
        width: Features of one dimension, in and out.
        level_causal: Which of the two kinds it is.

    Attributes:
        embeds: Whether content is embedded by the caller, as it is everywhere but in
            :class:`~dflows.backbones.Table`, which takes the values themselves.

    Raises:
        UserError: If the width is below 1.
    """

    embeds: ClassVar[bool] = True
    width: int
    level_causal: bool

    def __init__(self, width: int, *, level_causal: bool) -> None:
        super().__init__()
        check_positive(width=width)
        self.width = width
        self.level_causal = level_causal

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

    def features_at(
        self,
        dimensions: Tensor,
        content: Tensor,
        query: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Tensor:
        """Computes the features of some dimensions, which generation asks for level by level.

        A backbone that can leave out work for the others does.

        Args:
            dimensions: Indices (n,) of the dimensions, those of a context included.
            content: As in :meth:`forward`, as are the rest.
            query: Query.
            levels: Levels.

        Returns:
            Features (B, n, width), those of :meth:`forward` at these dimensions.
        """
        features: Tensor = self(content, query, levels)
        return features[:, dimensions]


class SteppedBackbone(Backbone):
    """Creates a level-causal backbone that can also compute one level after the other.

    Generation draws the values of a level, and needs the features of the next one. Evaluating the
    whole network for every level does the work of the earlier ones again; a stepped backbone keeps
    it in a cache. What the steps give equals the one evaluation of all levels::

        cache = backbone.begin(query, levels, batch_size)
        features = backbone.advance(cache, 0, None)  # (B, n0, width)
        features = backbone.advance(cache, 1, content_of_level_0)  # (B, n1, width)
        ...

    Both run without gradients.

    Attributes:
        steps: Whether this one, as it was configured, is level-causal and hence offers the steps.
    """

    @property
    def steps(self) -> bool:
        return self.level_causal

    @abstractmethod
    def begin(self, query: Tensor, levels: Tensor, batch_size: int) -> Any:
        """Prepares a cache for one batch.

        Args:
            query: Query (D, width) or (B, D, width).
            levels: Levels (D,), without a gap; -1 for context.
            batch_size: B.

        Returns:
            The cache, to be handed to :meth:`advance` and not looked into.

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


class Remembered(Generic[T]):
    """Creates a memory of what was worked out from levels, told apart by their tensors' identity.

    The levels of an ordering are the same tensor from call to call, and reading them would wait for
    the device.

    Arguments:
        function: What is worked out. It may be made in inference mode and be used in training.
    """

    def __init__(self, function: Callable[[Tensor], T]) -> None:
        self.function = function
        self._entries: list[tuple[Tensor, int, T]] = []

    def __call__(self, levels: Tensor) -> T:
        for known, version, value in self._entries:
            if known is levels and known._version == version:
                return value
        with torch.inference_mode(False):
            # A tensor made in inference mode could not be saved for the gradient.
            value = self.function(levels.clone() if levels.is_inference() else levels)
        if not levels.is_inference():
            self._entries = [
                *self._entries[1 - MOST_REMEMBERED :],
                (levels, levels._version, value),
            ]
        return value


def check_positive(**sizes: int) -> None:
    """Refuses sizes below 1.

    Raises:
        UserError: If one is, named after its key.
    """
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} is {size}: give at least 1")


def check_dropout(dropout: float, name: str = "dropout") -> None:
    """Refuses probabilities that drop everything or are none.

    Raises:
        UserError: If the dropout is not in [0, 1), named after its key.
    """
    if not 0 <= dropout < 1:
        raise UserError(f"{name} is {dropout}: give a probability from 0 to below 1")


def check_features(backbone: Backbone, features: Tensor) -> None:
    """Refuses features of another shape than (B, D, width).

    Raises:
        UserError: If the shape does not fit.
    """
    if features.ndim != 3 or features.shape[-1] != backbone.width:
        raise UserError(
            f"{type(backbone).__name__} takes features (batch, length, width={backbone.width}) "
            f"and was given {tuple(features.shape)}"
        )


def check_causal(
    backbone: Backbone, content: Tensor, query: Tensor | None, levels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Refuses a call of a level-causal backbone whose three arguments do not fit together.

    Returns:
        The query and the levels, both there.

    Raises:
        UserError: If one is missing or its shape does not fit.
    """
    check_features(backbone, content)
    name = type(backbone).__name__
    if query is None or levels is None:
        raise UserError(f"{name} is level-causal: call it with content, query and levels")
    fits = query.shape in (content.shape[1:], content.shape)
    if not fits or levels.shape != content.shape[1:2]:
        raise UserError(
            f"{name} was given content {tuple(content.shape)}, a query {tuple(query.shape)} and "
            f"levels {tuple(levels.shape)}: the query must be {tuple(content.shape[1:])}, or one "
            f"an example, and the levels {tuple(content.shape[1:2])}"
        )
    return query, levels


def check_length(backbone: Backbone, length: int, largest: int) -> None:
    """Refuses more dimensions than a backbone has parameters for.

    Raises:
        UserError: If there are more.
    """
    if length > largest:
        raise UserError(
            f"{type(backbone).__name__} was made for length={largest} and was given {length} "
            "dimensions (context counts): raise its `length`"
        )


def check_next_level(level: int, expected: int, content: Tensor | None, shape: list[int]) -> None:
    """Refuses a step that is not the next one, or content that is not that of the level before.

    Args:
        level: The level asked for.
        expected: The level that comes next.
        content: The content handed over.
        shape: The shape (B, n, width) that it should have; n is 0 where there is none.

    Raises:
        UserError: If either does not fit.
    """
    if level != expected:
        raise UserError(f"level {level} was asked for, and level {expected} is next")
    given = [shape[0], 0, shape[2]] if content is None else list(content.shape)
    if given != shape:
        raise UserError(
            f"level {level} needs the content {tuple(shape)} of level {level - 1} and was given "
            f"{tuple(given)}"
        )
