"""A cache of results computed from levels."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Remembered"]

T = TypeVar("T")

MOST_REMEMBERED = 32


class Remembered(Generic[T]):
    """Creates a cache of a function of levels, by the identity of their tensors.

    The levels of an ordering are the same tensor from call to call, and reading them would wait for
    the device.

    Args:
        function: The function. Results computed in inference mode may be used in training.

    Example:
        >>> highest = Remembered(lambda levels: int(levels.max()))
        >>> highest(torch.arange(3))
        2
    """

    def __init__(self, function: Callable[[Tensor], T]) -> None:
        self.function = function
        self._entries: list[tuple[Tensor, int, T]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Remembered[T]":
        return Remembered(self.function)  # a copy works its results out anew

    def __call__(self, levels: Tensor) -> T:
        for known, version, value in self._entries:
            # A copy that was made in inference mode holds tensors that know no version.
            if known is levels and not known.is_inference() and known._version == version:
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
