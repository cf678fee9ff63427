"""What guesses samples before a network settles them."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

__all__ = ["Drafter"]

Drafter: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Guesses values without a network: from indices (N, d), and a mask (N, d) of those to guess anew,
to indices (N, d)."""
