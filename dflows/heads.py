"""Heads: from the features of dimensions to their logits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.representations import full_precision

__all__ = ["Head", "HeadPerDimension"]


class Head(nn.Linear):
    """Creates an affine map from features to logits, the same for all dimensions.

    It computes in full precision: logits in half precision tie, and likelihoods suffer.

    Example:
        >>> Head(width=8, num_logits=3)(torch.zeros(2, 4, 8)).shape
        torch.Size([2, 4, 3])

    Args:
        width: Features of a dimension.
        num_logits: Logits of a dimension.
    """

    def __init__(self, width: int, num_logits: int) -> None:
        super().__init__(width, num_logits)

    def forward(self, features: Tensor) -> Tensor:
        """Computes logits (…, num_logits) of features (…, width)."""
        weight = full_precision(self.weight)
        return F.linear(features.to(weight.dtype), weight, full_precision(self.bias))


class HeadPerDimension(nn.Module):
    """Creates an affine map for every dimension, where these have classes of their own.

    Example:
        >>> head = HeadPerDimension(length=4, width=8, num_logits=3)
        >>> head(torch.zeros(2, 1, 8), torch.tensor([2])).shape
        torch.Size([2, 1, 3])

    Args:
        length: D.
        width: Features of a dimension.
        num_logits: Logits of a dimension.
    """

    def __init__(self, length: int, width: int, num_logits: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(length, num_logits, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(length, num_logits).uniform_(-bound, bound))

    def extra_repr(self) -> str:
        length, num_logits, width = self.weight.shape
        return f"{length=}, {width=}, {num_logits=}"

    def forward(self, features: Tensor, dimensions: Tensor) -> Tensor:
        """Computes logits of features.

        Args:
            features: Features (N, n, width).
            dimensions: The dimensions (n,) that they are of.

        Returns:
            Logits (N, n, num_logits).
        """
        weight = full_precision(self.weight[dimensions])
        logits = torch.einsum("ndw,dlw->ndl", features.to(weight.dtype), weight)
        return logits + full_precision(self.bias[dimensions])
