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

__all__ = [
    "MOST_STATES",
    "check_enumerable",
    "check_probabilities",
    "cross_entropy",
    "divergence",
    "entropy",
    "factorized_entropy",
    "marginals",
    "probabilities",
    "share_of_gap",
    "states",
]
