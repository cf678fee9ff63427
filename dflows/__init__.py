"""Discrete normalizing flows: exact-likelihood generative models of discrete data."""

# ruff: noqa: E402 - before the imports that take seconds
from dflows.starting import interruptible

interruptible()

from dflows import flows
from dflows.bases import AutoregressiveBase, FactorizedBase, NGramBase
from dflows.conditioner import Conditioner
from dflows.embedding import Context
from dflows.flow import DiscreteFlow, FlowDistribution
from dflows.loading import load
from dflows.transforms import ConditionalTransform, PermutationTransform

__all__ = [
    "AutoregressiveBase",
    "ConditionalTransform",
    "Conditioner",
    "Context",
    "DiscreteFlow",
    "FactorizedBase",
    "FlowDistribution",
    "NGramBase",
    "PermutationTransform",
    "flows",
    "load",
]
