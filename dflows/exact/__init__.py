"""Tiny problems of which everything is known: exact measures, and the best tabular flow."""

from dflows.exact.measures import (
    MOST_STATES,
    check_enumerable,
    check_probabilities,
    cross_entropy,
    divergence,
    entropy,
    factorized_entropy,
    marginals,
    probabilities,
    share_of_gap,
    states,
)
from dflows.exact.tabular import TabularFlow, exhaustive_optimum, tabular_flow

__all__ = [
    "MOST_STATES",
    "TabularFlow",
    "check_enumerable",
    "check_probabilities",
    "cross_entropy",
    "divergence",
    "entropy",
    "exhaustive_optimum",
    "factorized_entropy",
    "marginals",
    "probabilities",
    "share_of_gap",
    "states",
    "tabular_flow",
]
