"""One network for several numbers of passes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.objectives.end_to_end import EndToEnd
from dflows.objectives.objective import Objective

__all__ = ["SampledPasses"]


class SampledPasses(Objective):
    """Creates an objective that trains one network for several numbers of passes.

    Each step samples one of them and evaluates the flow with so many passes
    (:meth:`dflows.DiscreteFlow.with_passes`). How many to take is then a choice at generation.

    Args:
        passes: The numbers; one that is given twice is sampled twice as often.
        objective: What is maximised; the likelihood end to end by default.

    Raises:
        UserError: If there is none.

    Example:
        >>> from functools import partial
        >>> from dflows import flows
        >>> from dflows.backbones import LSTM
        >>> from dflows.orderings import Strided
        >>> lstm = partial(LSTM, width=8, ahead=4)
        >>> flow = flows.language_model(3, 16, lstm, ordering=Strided(4))
        >>> SampledPasses([4, 8, 16])(flow, torch.randint(3, (2, 16))).shape
        torch.Size([2])
        >>> flow.with_passes(8).sample((2,)).shape
        torch.Size([2, 16])
    """

    def __init__(self, passes: Sequence[int], objective: Objective | None = None) -> None:
        super().__init__()
        if not passes:
            raise UserError("passes is empty: give at least one number")
        self.passes = list(passes)
        self.objective = objective or EndToEnd()

    def extra_repr(self) -> str:
        return f"passes={self.passes}"

    @property
    def choices(self) -> list[int]:
        return sorted(set(self.passes))

    def prepare(self, flow: DiscreteFlow) -> None:
        for passes in self.choices:
            flow.with_passes(passes)
        self.objective.prepare(flow)

    def evaluate(
        self, flow: DiscreteFlow, y: Tensor, context: Tensor | None, progress: float | None
    ) -> Tensor:
        passes = self.passes[int(torch.randint(len(self.passes), ()))]
        return self.objective.evaluate(flow.with_passes(passes), y, context, progress)

    def end_to_end(self, progress: float | None) -> bool:
        return self.objective.end_to_end(progress)

    def num_stages(self, flow: DiscreteFlow) -> int:
        return self.objective.num_stages(flow)

    def frozen(self, flow: DiscreteFlow, progress: float | None) -> Sequence[nn.Parameter]:
        return self.objective.frozen(flow, progress)
