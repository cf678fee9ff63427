"""Rows of features, gathered."""

from torch import Tensor

__all__ = ["look_up"]


def look_up(rows: Tensor, sources: Tensor) -> Tensor:
    """Sets rows (B, R, W) side by side by their indices (m, n), (B, m, n·W)."""
    seen = rows.index_select(1, sources.flatten())
    return seen.reshape(rows.shape[0], len(sources), sources.shape[1] * rows.shape[2])
