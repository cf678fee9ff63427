"""Discrete normalizing flows: exact-likelihood generative models of discrete data."""

from dflows.bases import AutoregressiveBase, FactorizedBase, NGramBase
from dflows.flow import DiscreteFlow, FlowDistribution
from dflows.loading import load
from dflows.transforms import (
    AutoregressiveTransform,
    BipartiteTransform,
    ConditionalTransform,
    PermutationTransform,
)

__all__ = [
    "AutoregressiveBase",
    "AutoregressiveTransform",
    "BipartiteTransform",
    "ConditionalTransform",
    "DiscreteFlow",
    "FactorizedBase",
    "FlowDistribution",
    "NGramBase",
    "PermutationTransform",
    "load",
]
