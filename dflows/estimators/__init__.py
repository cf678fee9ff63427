r"""How learning passes the discrete choice.

The likelihood of a discrete flow has no log-determinant: every transform returns zeros of the
batch shape in its place. This zero is where learning happens. Its value never changes, but it is a
node of the graph, and so it carries gradients down and up:

- its own gradient is :math:`c = \partial\text{loss}/\partial\log p` of every example, whatever
  means, accumulation, loss scaling or averaging over ranks came after. The posterior rule divides
  by it to recover the log-likelihood's gradient exactly;
- the local objective adds :math:`\ell - \text{stop}(\ell)` to it: nothing in value, and the
  gradient of each flow's own likelihood.

So the same line trains with every estimator: ``(-flow.objective(y).mean()).backward()``.
"""

from dflows.estimators.drawn import GumbelStraightThrough, ReinMax
from dflows.estimators.estimator import Draw, Estimator
from dflows.estimators.joint import JointInTurn
from dflows.estimators.local import LocalInTurn, LocalObjective, LocalThenJoint
from dflows.estimators.through import PosteriorRule, SoftmaxStraightThrough

__all__ = [
    "Draw",
    "Estimator",
    "GumbelStraightThrough",
    "JointInTurn",
    "LocalInTurn",
    "LocalObjective",
    "LocalThenJoint",
    "PosteriorRule",
    "ReinMax",
    "SoftmaxStraightThrough",
]
