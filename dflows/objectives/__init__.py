"""What training maximises, given the flow: ``objective(flow, y, context, progress)``.

An objective holds what only training needs: targets and stages. It keeps no clock: the training
passes the progress. Its value is one number an example, the log-likelihood or an unbiased estimate
of it; its gradient is its own::

    objective = Local()
    objective.prepare(flow)
    (-objective(flow, y).mean()).backward()
"""

from dflows.objectives.end_to_end import EndToEnd
from dflows.objectives.expectation import LocalExpectationGradient
from dflows.objectives.layerwise import Layerwise
from dflows.objectives.local import Local
from dflows.objectives.objective import Objective
from dflows.objectives.random_orderings import RandomOrderings
from dflows.objectives.sampled_passes import SampledPasses
from dflows.objectives.sequence import OneAfterAnother

__all__ = [
    "EndToEnd",
    "Layerwise",
    "Local",
    "LocalExpectationGradient",
    "Objective",
    "OneAfterAnother",
    "RandomOrderings",
    "SampledPasses",
]
