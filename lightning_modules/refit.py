"""The base in closed form, while the transforms on it are trained."""

import torch
from torch import Tensor, nn

from dflows.bases import ClosedFormBase
from dflows.errors import UserError
from dflows.flow import DiscreteFlow

__all__ = ["ClosedFormRefit"]


class ClosedFormRefit(nn.Module):
    """Creates what sets the base of a flow in closed form, from running counts of what reaches it.

    The base is trained by gradients no more.

    Args:
        flow: The flow.
        every: Optimizer steps from one refit to the next, at least 1.
        decay: What the counts are multiplied by before each further batch, from 0 to below 1.

    Raises:
        UserError: If a number is out of range, the base has no closed form, or nothing is left to
            train otherwise.

    Example:
        >>> from dflows import flows
        >>> flow = flows.strided(num_classes=3, length=4, columns=2)
        >>> refit = ClosedFormRefit(flow, every=10, decay=0.9)
        >>> refit.update(flow, refit.count(flow, torch.tensor([[0, 1, 1, 1]])))
        >>> refit.counts
        tensor([[1., 1., 0.],
                [0., 2., 0.]], dtype=torch.float64)
    """

    counts: Tensor

    def __init__(self, flow: DiscreteFlow, every: int, decay: float) -> None:
        super().__init__()
        if every < 1 or not 0 <= decay < 1:
            raise UserError(
                f"base_refit_every is {every} and base_refit_decay is {decay}: give at least 0 "
                "steps, and a factor from 0 to below 1"
            )
        counts = _closed_form(flow).count(torch.zeros(1, 1, dtype=torch.long))
        flow.base.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in flow.parameters()):
            raise UserError(
                f"base_refit_every is {every}, and the model has nothing to train but the base: "
                "set it to 0, or give it transforms"
            )
        self.every = every
        self.decay = decay
        self.register_buffer("counts", torch.zeros_like(counts))

    def count(self, flow: DiscreteFlow, x: Tensor) -> Tensor:
        """Counts what the transforms left of a batch, (N, d); counts of processes add up."""
        return _closed_form(flow).count(x)

    def update(self, flow: DiscreteFlow, counts: Tensor) -> None:
        """Adds the counts of a batch to the running ones, and sets the base to them."""
        self.counts = self.counts * self.decay + counts
        _closed_form(flow).refit(self.counts)


def _closed_form(flow: DiscreteFlow) -> ClosedFormBase:
    if not isinstance(flow.base, ClosedFormBase):
        raise UserError(
            f"base_refit_every is set, and a {type(flow.base).__name__} has no closed form: set it "
            "to 0, or choose FactorizedBase"
        )
    return flow.base
