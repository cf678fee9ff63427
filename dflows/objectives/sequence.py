"""One objective after another."""

from collections.abc import Sequence

from torch import Tensor, nn

from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.objectives.layerwise import ROUND_OFF
from dflows.objectives.objective import Objective, check_progress, idle

__all__ = ["OneAfterAnother"]


class OneAfterAnother(Objective):
    """Creates an objective that uses one objective first, and then another.

    For example, local losses quickly make each transform good by itself, and the likelihood then
    trains them end to end. Each objective receives the progress of its own part of the training.

    Args:
        first: The first objective.
        then: The second objective.
        at: The fraction of the training after which they change.

    Raises:
        UserError: If `at` is not between 0 and 1.

    Example:
        >>> from dflows.objectives import EndToEnd, Local
        >>> objective = OneAfterAnother(Local(), EndToEnd(), at=0.25)
        >>> objective.current(0.2), objective.current(0.25)
        (Local(
          subsample='none'
          (targets): ParameterDict()
        ), EndToEnd(subsample='none'))
    """

    def __init__(self, first: Objective, then: Objective, at: float = 0.5) -> None:
        super().__init__()
        if not 0 < at < 1:
            raise UserError(f"at is {at}: give a fraction of the training between 0 and 1")
        self.first = first
        self.then = then
        self.at = at

    def extra_repr(self) -> str:
        return f"at={self.at}"

    def prepare(self, flow: DiscreteFlow) -> None:
        self.first.prepare(flow)
        self.then.prepare(flow)

    def current(self, progress: float | None) -> Objective:
        """Returns the objective at this point of the training.

        Raises:
            UserError: If the progress is unknown.
        """
        done = check_progress(self, progress) >= self.at - ROUND_OFF
        return self.then if done else self.first

    def _own(self, progress: float | None) -> float:
        """Returns the progress of the current objective's own part."""
        progress = check_progress(self, progress)
        if self.current(progress) is self.first:
            return progress / self.at
        return max(progress - self.at, 0.0) / (1 - self.at)

    def end_to_end(self, progress: float | None) -> bool:
        return self.current(progress).end_to_end(self._own(progress))

    def frozen(self, flow: DiscreteFlow, progress: float | None) -> Sequence[nn.Parameter]:
        now = self.current(progress)
        other = self.first if now is self.then else self.then
        return [*now.frozen(flow, self._own(progress)), *other.parameters()]

    def evaluate(
        self, flow: DiscreteFlow, y: Tensor, context: Tensor | None, progress: float | None
    ) -> Tensor:
        now = self.current(progress)
        other = self.first if now is self.then else self.then
        return now.evaluate(flow, y, context, self._own(progress)) + idle(other)
