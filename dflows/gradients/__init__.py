r"""How a discrete choice is differentiated.

A bijection whose map is chosen by a softmax holds a rule: it maps logits (…, M) to the one-hot
vector of the choice, and back-propagates in its place a gradient that logits can learn from.
"""

from dflows.gradients.posterior import PosteriorRule
from dflows.gradients.rule import GradientRule, gumbel_like
from dflows.gradients.stochastic import GumbelStraightThrough, ReinMax
from dflows.gradients.straight_through import SoftmaxStraightThrough
from dflows.gradients.weights import ExampleWeights, example_weights

__all__ = [
    "ExampleWeights",
    "GradientRule",
    "GumbelStraightThrough",
    "PosteriorRule",
    "ReinMax",
    "SoftmaxStraightThrough",
    "example_weights",
    "gumbel_like",
]
