"""The interface of all gradient rules."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ["GradientRule", "gumbel_like"]


class GradientRule(nn.Module, ABC):
    """A rule from logits to one-hot vectors: which class is chosen, and what gradient it has."""

    stochastic: ClassVar[bool] = False
    """Whether the choice is sampled from the softmax of the logits in training mode. In evaluation
    mode it is the largest logit, as it always is of the other rules."""

    @property
    def choice_temperature(self) -> float:
        """Temperature of the softmax whose expected log-likelihood the gradient stands for."""
        return 1.0

    @abstractmethod
    def forward(self, logits: Tensor) -> Tensor:
        """Chooses a class.

        Args:
            logits: Logits (…, M), in float32 or better.

        Returns:
            One-hot vectors (…, M) with the gradient of the rule.
        """


def gumbel_like(logits: Tensor) -> Tensor:
    """Samples Gumbel noise: with it, the largest of logits is a sample from their softmax."""
    return -torch.empty_like(logits).exponential_().log()
