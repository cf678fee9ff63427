"""Checks of what a backbone is called with."""

from torch import Tensor

from dflows.backbones.backbone import Backbone
from dflows.errors import UserError

__all__ = ["check_causal", "check_features", "check_length", "check_next_level"]


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
