"""Views: copies of modules that share their parameters."""

import copy
from typing import Any, TypeVar

from torch import nn

__all__ = ["view"]

M = TypeVar("M", bound=nn.Module)


def view(module: M, **changed: Any) -> M:
    """Returns a copy of a module that shares all its parameters and parts, but for what is changed.

    Args:
        module: The module.
        changed: Attributes and parts of the copy.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> other = view(layer, in_features=5)
        >>> other.weight is layer.weight, layer.in_features, other.in_features
        (True, 2, 5)
    """
    other = copy.copy(module)
    # A shallow copy would share the table of the parts, and a change would reach the original.
    other.__dict__["_modules"] = dict(module._modules)
    for name, value in changed.items():
        setattr(other, name, value)
    return other
