"""The likelihood end to end."""

from typing import Literal

from torch import Tensor

from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.gradients import example_weights
from dflows.objectives.objective import Objective, check_choice

__all__ = ["EndToEnd"]


class EndToEnd(Objective):
    """Creates the likelihood as objective: all parts learn from one log-probability.

    Its gradient crosses the transforms by their bijections' rules (:mod:`dflows.gradients`), as
    that of :meth:`dflows.DiscreteFlow.log_prob` does.

    Args:
        subsample: Where the base's backbone runs masked: ``none`` evaluates all levels; ``levels``
            one level an example, an unbiased estimate at one evaluation.

    Raises:
        UserError: If `subsample` is neither.

    References:
        | Discrete Flows (Tran et al., 2019)
        | https://arxiv.org/abs/1905.10347

    Example:
        >>> import torch
        >>> from dflows import flows
        >>> flow = flows.bipartite(num_classes=3, length=4)
        >>> EndToEnd()(flow, torch.randint(3, (2, 4))).shape
        torch.Size([2])
    """

    def __init__(self, subsample: Literal["none", "levels"] = "none") -> None:
        super().__init__()
        check_choice("subsample", subsample, ("none", "levels"))
        self.subsample = subsample

    def extra_repr(self) -> str:
        return f"subsample={self.subsample!r}"

    def prepare(self, flow: DiscreteFlow) -> None:
        if flow.transforms_learn and not flow.base.differentiable:
            raise UserError(
                f"transforms learn from the gradient of the base, and a {type(flow.base).__name__} "
                "has none: train with Local, which needs none, or choose another base"
            )

    def end_to_end(self, progress: float | None) -> bool:
        return True

    def evaluate(
        self, flow: DiscreteFlow, y: Tensor, context: Tensor | None, progress: float | None
    ) -> Tensor:
        with example_weights() as weights:
            x = flow.inverse(flow.differentiable(y), context)
            if self.subsample == "levels":
                return weights(flow.base.sampled_log_prob(x, context))
            return weights(flow.base.log_prob(x, context).sum(dim=-1))
