"""The interface of all objectives."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from dflows.errors import UserError
from dflows.experts import leave_one_out
from dflows.flow import DiscreteFlow
from dflows.representations import flatten_batch

__all__ = ["Objective", "check_choice", "check_progress", "idle"]


class Objective(nn.Module, ABC):
    """What a training step maximises, given the flow.

    In training mode experts leave each value's own occurrence out of their counts
    (:func:`dflows.experts.leave_one_out`): the value is then no log-probability.
    """

    @property
    def choices(self) -> Sequence[int]:
        """The numbers of passes that it trains a flow for, where there are several to choose from.

        Each once, rising.
        """
        return []

    def prepare(self, flow: DiscreteFlow) -> None:
        """Checks that the objective can train a flow, and creates its parameters.

        Call it before creating the optimizer.

        Raises:
            UserError: If the objective cannot train the flow.
        """

    def forward(
        self,
        flow: DiscreteFlow,
        y: Tensor,
        context: Tensor | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """Computes the objective.

        Args:
            flow: The flow.
            y: Indices (…, d).
            context: What the flow is conditioned on, (B, …) with B the last batch dimension of y.
            progress: The completed fraction of the training, 0 to 1; only objectives of several
                stages need it.

        Returns:
            One value an example (…), in nats.

        Raises:
            UserError: If `y` holds no indices, or the progress is needed and not given.
        """
        context = flow.encode_context(context)
        flat, context, shape = flatten_batch(flow.check_indices(y), context)
        with leave_one_out():
            return self.evaluate(flow, flat, context, progress).reshape(shape)

    @abstractmethod
    def evaluate(
        self, flow: DiscreteFlow, y: Tensor, context: Tensor | None, progress: float | None
    ) -> Tensor:
        """Computes the objective (N,) of indices (N, d) and an encoded context."""

    def end_to_end(self, progress: float | None) -> bool:
        """Returns whether the gradient now crosses transforms by their bijections' rules."""
        return False

    def num_stages(self, flow: DiscreteFlow) -> int:
        """Returns the number of equal stages, in which different parameters learn.

        The learning rate schedule should run once a stage.
        """
        return 1

    def frozen(self, flow: DiscreteFlow, progress: float | None) -> Sequence[nn.Parameter]:
        """Returns the parameters that do not learn at this point of the training.

        Their gradients are zeros, which distributed training waits for. An optimizer with momentum
        would still move them, so set their gradients to None before each step.
        """
        return []


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a value that is none of the choices.

    Raises:
        UserError: If `value` is none of `choices`.
    """
    if value not in choices:
        raise UserError(f"{name} is {value!r}: give {', '.join(map(repr, choices))}")


def check_progress(objective: Objective, progress: float | None) -> float:
    """Returns the progress.

    Raises:
        UserError: If the progress is unknown.
    """
    if progress is None:
        raise UserError(
            f"{type(objective).__name__} trains in stages, and the progress of the training is "
            "unknown: call objective(flow, y, context, progress=0.0 … 1.0), and the trainer "
            "max_steps, max_epochs or max_time"
        )
    return progress


def idle(*modules: nn.Module | None) -> Tensor | float:
    """Returns a zero that depends on all parameters, which distributed training waits for."""
    parameters = (
        parameter
        for module in modules
        if module is not None
        for parameter in module.parameters()
        if parameter.requires_grad
    )
    return sum((0 * parameter.sum() for parameter in parameters), start=0.0)
