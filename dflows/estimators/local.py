"""Estimators that train every flow on an objective of its own."""

from torch import Tensor

from dflows.bijections import Bijection
from dflows.errors import UserError
from dflows.estimators.estimator import Draw, Estimator
from dflows.estimators.through import PosteriorRule
from dflows.representations import is_one_hot, to_indices, to_one_hot

__all__ = ["LocalInTurn", "LocalObjective", "LocalThenJoint"]


class _Local(Estimator):
    through = False

    def inverse(
        self, bijection: Bijection, y: Tensor, logits: Tensor, ladj: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        indices = to_indices(y)
        local = bijection.local_log_likelihood(indices, logits, target).sum(dim=-1)
        x = bijection.inverse(indices, logits.detach())
        if is_one_hot(y):
            x = to_one_hot(x, bijection.num_classes, y.dtype)
        return x, ladj + (local - local.detach())

    def forward_map(
        self, bijection: Bijection, x: Tensor, logits: Tensor, ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = bijection(to_indices(x), logits.detach())
        return to_one_hot(y, bijection.num_classes, x.dtype), ladj


class LocalObjective(_Local):
    """Creates the local objective: every flow is trained at once, each on a likelihood of its own.

    No gradient crosses flows, so nothing is biased by depth and the graph is a layer deep. What a
    flow maximises is its bijection's `local_log_likelihood`: the cross-entropy of its classes for
    rank permutations and shifts, the mixture's likelihood for the location-scale map.

    Arguments:
        draw: What one training step of a flow whose backbone runs masked evaluates, an example at
            a time: ``all`` levels, one ``level`` of each flow (an unbiased estimate at one
            evaluation a flow), or one level of one ``flow`` alone. A level-causal backbone
            supervises all levels in one evaluation, and only ``flow`` makes a difference to it.

    Raises:
        UserError: If `draw` is none of these.
    """

    def __init__(self, draw: Draw = "all") -> None:
        super().__init__()
        if draw not in ("all", "level", "flow"):
            raise UserError(f"draw is {draw!r}: give 'all', 'level' or 'flow'")
        self.draw = draw

    def extra_repr(self) -> str:
        return f"draw={self.draw!r}"


class LocalInTurn(_Local):
    """Creates the local objective of one flow after the other, the one next to the data first.

    Trained all at once, a flow learns from what the flows on its data's side make of the data, and
    this goes on changing while they learn. In turn, each flow learns from what is settled, and a
    step costs the training of one flow, however many there are. It asks for as many steps as all
    flows need together. A learning rate that takes its course once a turn settles each.

    The flows share the training equally, by steps or by time, and
    :class:`lightning_modules.DiscreteFlowModule` makes the learning rate take its course once a
    turn; or a turn is of so many steps, and :class:`lightning_modules.Optimization` is given the
    `cycles`. Of a backbone that runs masked, one level an example is trained in a step.

    Arguments:
        steps: Optimizer steps of one turn; when all flows had theirs, the last goes on. None: an
            equal part of the training, of which a training loop of one's own tells
            :meth:`dflows.DiscreteFlow.at_step` how much is done.

    Raises:
        UserError: If the number of steps is below 1.

    Example:
        >>> estimator = LocalInTurn(steps=100)
        >>> estimator.at_step(250)
        >>> estimator.turn
        2
        >>> estimator = LocalInTurn()
        >>> estimator.at_progress(0.4, num_flows=8)
        >>> estimator.turn
        3
    """

    draw = "turn"

    def __init__(self, steps: int | None = None) -> None:
        super().__init__()
        if steps is not None and steps < 1:
            raise UserError(
                f"steps is {steps}: give at least 1, or none for equal parts of the training"
            )
        self.steps = steps
        self.turn = None if steps is None else 0

    def extra_repr(self) -> str:
        return f"steps={self.steps}"

    def at_step(self, step: int) -> None:
        if self.steps is not None:
            self.turn = step // self.steps

    def at_progress(self, progress: float, num_flows: int) -> None:
        if self.steps is None:
            self.turn = int(progress * num_flows * self.rounds)


class LocalThenJoint(Estimator):
    """Creates an estimator that trains each flow by itself first, and then all of them jointly.

    The local objective leads the flows quickly to where each is good by itself; from there another
    estimator trains them on the one likelihood of all. Which of the two it is follows from the
    number of the step alone (:meth:`at_step`), so that a resumed run goes on with the right one;
    :class:`lightning_modules.DiscreteFlowModule` tells it, and a training loop of one's own calls
    :meth:`dflows.DiscreteFlow.at_step`.

    Arguments:
        joint_from_step: Optimizer steps that the local objective trains for.
        joint: The estimator after them, one that hands gradients from flow to flow; by default the
            posterior rule.
        draw: What the local objective trains in one step; as in :class:`LocalObjective`.

    Raises:
        UserError: If the number of steps is negative, or `joint` hands no gradient on.

    Example:
        >>> estimator = LocalThenJoint(joint_from_step=100)
        >>> estimator.at_step(99)
        >>> estimator.through
        False
        >>> estimator.at_step(100)
        >>> estimator.through
        True
    """

    def __init__(
        self, joint_from_step: int, joint: Estimator | None = None, draw: Draw = "all"
    ) -> None:
        super().__init__()
        joint = joint or PosteriorRule()
        if joint_from_step < 0:
            raise UserError(f"joint_from_step is {joint_from_step}: give at least 0")
        if not joint.through:
            raise UserError(
                f"joint is {type(joint).__name__}, which hands no gradient from flow to flow: give "
                "PosteriorRule or SoftmaxStraightThrough"
            )
        self.joint_from_step = joint_from_step
        self.local = LocalObjective(draw)
        self.joint = joint
        self.is_joint = joint_from_step == 0

    def extra_repr(self) -> str:
        return f"joint_from_step={self.joint_from_step}"

    @property
    def _now(self) -> Estimator:
        return self.joint if self.is_joint else self.local

    @property
    def through(self) -> bool:  # type: ignore[override]
        return self._now.through

    @property
    def draw(self) -> Draw:  # type: ignore[override]
        return self._now.draw

    @property
    def draws_maps(self) -> bool:  # type: ignore[override]
        return self._now.draws_maps

    def check(self, bijection: Bijection) -> None:
        self.joint.check(bijection)

    def at_progress(self, progress: float, num_flows: int) -> None:
        self._now.at_progress(progress, num_flows)

    def at_step(self, step: int) -> None:
        self.is_joint = step >= self.joint_from_step
        self._now.at_step(step)

    def inverse(
        self, bijection: Bijection, y: Tensor, logits: Tensor, ladj: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.is_joint and target is not None:
            ladj = ladj + 0 * target.sum()  # distributed training awaits all parameters
        return self._now.inverse(bijection, y, logits, ladj, target)

    def forward_map(
        self, bijection: Bijection, x: Tensor, logits: Tensor, ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._now.forward_map(bijection, x, logits, ladj)
