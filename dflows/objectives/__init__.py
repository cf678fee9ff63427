"""What training maximises, given the flow: ``objective(flow, y, context, progress)``.

An objective is an object of its own and holds all that only training needs: targets, schedules. It
keeps no clock: whoever runs the training tells it the progress. The value is one number an example,
the log-likelihood or an unbiased estimate of it, and the gradient is the objective's::

    objective = Local()
    objective.prepare(flow)
    (-objective(flow, y).mean()).backward()
"""

from dflows.objectives.end_to_end import EndToEnd
from dflows.objectives.expectation import LocalExpectationGradient
from dflows.objectives.layerwise import Layerwise
from dflows.objectives.local import Local
from dflows.objectives.objective import Objective
from dflows.objectives.sequence import OneAfterAnother

__all__ = [
    "EndToEnd",
    "Layerwise",
    "Local",
    "LocalExpectationGradient",
    "Objective",
    "OneAfterAnother",
]
