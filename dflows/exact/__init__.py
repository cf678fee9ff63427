"""Tiny problems of which everything is known: measures, gradients, and the best tabular flow."""

from dflows.exact.exhaustive import exhaustive_optimum
from dflows.exact.expectations import expected_log_likelihood, mixture_log_likelihood
from dflows.exact.gradients import (
    GradientComparison,
    compare_gradients,
    compare_objectives,
)
from dflows.exact.measures import (
    MOST_STATES,
    check_enumerable,
    check_probabilities,
    cross_entropy,
    divergence,
    entropy,
    expected_loss,
    factorized_entropy,
    marginals,
    probabilities,
    share_of_gap,
    states,
)
from dflows.exact.tabular import TabularFlow, tabular_flow

__all__ = [
    "MOST_STATES",
    "GradientComparison",
    "TabularFlow",
    "check_enumerable",
    "check_probabilities",
    "compare_gradients",
    "compare_objectives",
    "cross_entropy",
    "divergence",
    "entropy",
    "exhaustive_optimum",
    "expected_log_likelihood",
    "expected_loss",
    "factorized_entropy",
    "marginals",
    "mixture_log_likelihood",
    "probabilities",
    "share_of_gap",
    "states",
    "tabular_flow",
]
