"""Rotary positions: features rotated by an angle that grows with the position."""

from math import log

import torch
from torch import Tensor

__all__ = ["rotary_table", "rotate"]


def rotary_table(positions: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Tabulates the cosines and signed sines (2, D, 1, features) of positions (D,)."""
    exponents = torch.arange(0, features, 2, device=positions.device) / features
    precise = torch.promote_types(dtype, torch.float32)
    angles = positions.to(precise).unsqueeze(-1) * torch.exp(-log(10000.0) * exponents.to(precise))
    cosines = torch.cat([angles.cos(), angles.cos()], dim=-1)
    sines = torch.cat([-angles.sin(), angles.sin()], dim=-1)
    return torch.stack([cosines, sines]).unsqueeze(-2).to(dtype)


def rotate(features: Tensor, rotary: Tensor | None) -> Tensor:
    """Rotates features (B, D, heads, features) in pairs, the first half with the second."""
    if rotary is None:
        return features
    cosines, sines = rotary.to(features.dtype)
    return torch.addcmul(features * cosines, features.roll(features.shape[-1] // 2, -1), sines)
