"""Layerwise training: one transform at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.objectives.local import LocalLosses, Step
from dflows.objectives.objective import check_progress

__all__ = ["Layerwise"]

ROUND_OFF = 1e-9


class Layerwise(LocalLosses):
    """Creates layerwise training: the local objective, one transform at a time, data side first.

    Trained all at once, a transform learns from the output of the transforms on its data side,
    which keeps changing while they learn. Layerwise, each learns from settled input, and a step
    costs the training of one transform, however many there are. It takes as many steps as all
    transforms need together. The base learns all the time.

    The training is divided into equal stages, one a transform. A backbone that runs masked trains
    one level an example in each step.

    Raises:
        UserError: If the transforms of a prepared flow share a backbone.

    References:
        | Greedy Layer-Wise Training of Deep Networks (Bengio et al., 2006)

    Example:
        >>> from dflows import flows
        >>> flow, objective = flows.bipartite(num_classes=3, length=4), Layerwise()
        >>> objective.prepare(flow)
        >>> objective.num_stages(flow), objective.stage(flow, progress=0.6)
        (2, 1)
    """

    rounds: int = 1
    """Number of stages of each transform."""

    def prepare(self, flow: DiscreteFlow) -> None:
        super().prepare(flow)
        conditional = flow.conditional_transforms
        if len({id(part.conditioner.backbone) for part in conditional}) < len(conditional):
            raise UserError(
                "transforms trained layerwise share a backbone, so that each would undo what the "
                "one before it learned: give each its own, or train with Local"
            )

    def num_stages(self, flow: DiscreteFlow) -> int:
        return max(1, self.rounds * len(flow.conditional_transforms))

    def stage(self, flow: DiscreteFlow, progress: float | None) -> int:
        """Returns the number of the stage, in rounds of all transforms, data side first.

        Raises:
            UserError: If there are several stages, and the progress is unknown.
        """
        stages = self.num_stages(flow)
        if stages == 1:
            return 0
        # The product of a quotient may fall short of the whole number that it is.
        return min(int(check_progress(self, progress) * stages + ROUND_OFF), stages - 1)

    def frozen(self, flow: DiscreteFlow, progress: float | None) -> Sequence[nn.Parameter]:
        conditional = flow.conditional_transforms
        if len(conditional) < 2:
            return []
        learns = len(conditional) - 1 - self.stage(flow, progress) % len(conditional)
        frozen: list[nn.Parameter] = []
        for number, transform in enumerate(conditional):
            if number != learns:
                frozen += transform.parameters()
                frozen += [value for key, value in self.targets.items() if key == str(number)]
        return frozen

    def evaluate(
        self, flow: DiscreteFlow, y: Tensor, context: Tensor | None, progress: float | None
    ) -> Tensor:
        count = number = len(flow.conditional_transforms)
        rounds, stage = divmod(self.stage(flow, progress), max(count, 1))
        total = torch.zeros(len(y), device=y.device)
        for position, transform in reversed([*enumerate(flow.transforms)]):
            if transform.ordering is None:
                y = transform.inverse(y, context)
                continue
            number -= 1
            if number == count - 1 - stage:
                y, zeros, _ = self.learn(flow, position, number, y, context, rounds)
                total = total + zeros
            else:
                total = total + self.idle(transform, number)
                with torch.no_grad():
                    y = transform.inverse(y, context)
        return flow.base.sampled_log_prob(y, context) + total

    def learn(
        self,
        flow: DiscreteFlow,
        position: int,
        number: int,
        y: Tensor,
        context: Tensor | None,
        rounds: int,
    ) -> Step:
        """Trains and inverts the transform of the current stage.

        Args:
            flow: The flow.
            position: Index of the transform in the stack.
            number: Its number among the conditional ones.
            y: Indices (N, d).
            context: Vectors (N, C) or sequences (N, S, C).
            rounds: Number of completed rounds.
        """
        transform = flow.conditional_transforms[number]
        return self.step(transform, number, y, context, one_level=True)
