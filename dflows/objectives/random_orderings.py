"""One network for all orderings."""

from torch import Tensor

from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.objectives.objective import Objective

__all__ = ["RandomOrderings"]


class RandomOrderings(Objective):
    """Creates the objective that trains one network for all orderings of the dimensions.

    Its value is an unbiased estimate of the mean log-probability over all orders, at one
    evaluation: a number of known dimensions and their places are drawn for every example, and the
    others are scored given these (Hoogeboom et al., equation 4). By Jensen's inequality that mean
    is below the logarithm of the mean probability.

    References:
        | Autoregressive Diffusion Models (Hoogeboom et al., 2022)
        | https://arxiv.org/abs/2110.02037

    Example:
        >>> import torch
        >>> from dflows import flows
        >>> flow = flows.any_order(num_classes=3, length=4)
        >>> RandomOrderings()(flow, torch.randint(3, (2, 4))).shape
        torch.Size([2])
    """

    def prepare(self, flow: DiscreteFlow) -> None:
        if len(flow.transforms) or not flow.base.any_order:
            raise UserError(
                "RandomOrderings trains a base that serves all orderings, without transforms: make "
                "the flow by dflows.flows.any_order, or choose another objective"
            )

    def evaluate(
        self, flow: DiscreteFlow, y: Tensor, context: Tensor | None, progress: float | None
    ) -> Tensor:
        return flow.base.random_order_log_prob(y, context)
