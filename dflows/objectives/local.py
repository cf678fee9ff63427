"""Local objectives: every transform learns from its own loss."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.objectives.objective import Objective, check_choice, idle
from dflows.representations import to_one_hot
from dflows.transforms import ConditionalTransform

__all__ = ["Local", "LocalLosses"]


class Step(NamedTuple):
    """The result of one transform in a training step.

    `x` (N, d) is correct where `weight` (N, d) is not 0, or everywhere without weights, which make
    a sum over dimensions unbiased. `zeros` (N,) have the gradient of the transform's loss.
    """

    x: Tensor
    zeros: Tensor
    weight: Tensor | None = None


def _zeros(log_likelihood: Tensor) -> Tensor:
    return log_likelihood - log_likelihood.detach()


def _add_at(total: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    dtype = torch.promote_types(total.dtype, value.dtype)
    return total.to(dtype).index_add(0, rows, value.to(dtype))


class LocalLosses(Objective):
    """The base of objectives in which each transform has its own loss.

    That is the negative :meth:`~dflows.bijections.Bijection.local_log_likelihood`. A bijection that
    needs a target distribution of x gets one, which is learned, too, and starts peaked on class 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.targets = nn.ParameterDict()

    def prepare(self, flow: DiscreteFlow) -> None:
        conditional = flow.conditional_transforms
        for transform in flow.transforms:
            if transform.ordering is None and any(True for _ in transform.parameters()):
                raise UserError(
                    f"{type(transform).__name__} in the stack has parameters and no loss of its "
                    "own: train the flow EndToEnd"
                )
        for number, transform in enumerate(conditional):
            if transform.bijection.needs_target and str(number) not in self.targets:
                num_classes = transform.bijection.num_classes
                weight = transform.conditioner.head.weight
                peaked = to_one_hot(torch.tensor(0), num_classes).to(weight)
                self.targets[str(number)] = nn.Parameter(peaked * math.log(num_classes))

    def target(self, number: int) -> Tensor | None:
        """Returns the target of a transform, log-probabilities (K,) of x, if it has one."""
        key = str(number)
        return self.targets[key].log_softmax(dim=-1) if key in self.targets else None

    def idle(self, transform: nn.Module | None, number: int) -> Tensor | float:
        """Returns a zero that depends on the parameters and the target of a transform."""
        unused, target = idle(transform), self.target(number)
        return unused if target is None else unused + 0 * target.sum()

    def step(
        self,
        transform: ConditionalTransform,
        number: int,
        y: Tensor,
        context: Tensor | None,
        *,
        one_level: bool = False,
        need_all: bool = True,
    ) -> Step:
        """Trains and inverts one transform.

        Args:
            transform: The transform.
            number: Its number among the conditional ones, base → data.
            y: Indices (N, d).
            context: Vectors (N, C) or sequences (N, S, C).
            one_level: Whether to train one level an example, where each level takes an evaluation.
            need_all: Whether x must be correct at all dimensions nonetheless.
        """
        target = self.target(number)
        if target is None and transform.bijection.needs_target:
            raise UserError(
                f"{type(self).__name__} has no target for a {type(transform.bijection).__name__}: "
                "call objective.prepare(flow) once, before creating the optimizer"
            )
        if one_level and not transform.conditioner.one_pass:
            sampled = _sampled_level(transform, y, target, context)
            if not need_all:
                return sampled
            with torch.no_grad():
                return Step(transform.inverse(y, context), sampled.zeros)
        dimensions = transform.transformed(y)
        logits = transform.logits(y, dimensions, context)
        part = y[:, dimensions]
        bijection = transform.bijection.at(dimensions)
        local = bijection.local_log_likelihood(part, logits, target).sum(dim=-1)
        x = y.index_copy(1, dimensions, bijection.inverse(part, logits.detach()))
        return Step(x, _zeros(local))


def _sampled_level(
    transform: ConditionalTransform, y: Tensor, target: Tensor | None, context: Tensor | None
) -> Step:
    """Inverts and trains one sampled level an example."""
    conditioner = transform.conditioner
    layout = conditioner.layout(y.shape[1], y.device)
    num_levels = len(layout.members) - 1
    weight = (layout.levels == 0).float().expand(y.shape)
    if num_levels == 0:
        return Step(y, torch.zeros(len(y), device=y.device), weight)
    level = torch.randint(1, num_levels + 1, y.shape[:1], device=y.device)
    sampled, logits = conditioner.sampled_level_logits(y, level, context)
    rows, dimensions = sampled.nonzero().unbind(dim=-1)
    bijection = transform.bijection.at(dimensions)
    local = num_levels * bijection.local_log_likelihood(y[sampled], logits, target)
    zeros = local.new_zeros(len(y)).index_add(0, rows, _zeros(local))
    x = y.masked_scatter(sampled, bijection.inverse(y[sampled], logits.detach()))
    return Step(x, zeros, weight + num_levels * sampled)


class Local(LocalLosses):
    """Creates the local objective: all transforms at once, each on its own likelihood.

    No gradient crosses transforms, so depth biases nothing and the graph is one layer deep. A
    transform maximises its bijection's `local_log_likelihood`: the cross-entropy of its classes for
    rank permutations and shifts, the likelihood of a mixture for the location-scale map.

    Args:
        subsample: What a step evaluates, per example, where a backbone runs masked. ``none``: all
            levels; ``levels``: one level of each transform and of the base, an unbiased estimate at
            one evaluation each; ``transforms``: one level of one transform. Level-causal backbones
            evaluate all levels at once; only ``transforms`` affects them.

    Raises:
        UserError: If `subsample` is none of these.

    Example:
        >>> from dflows import flows
        >>> flow, objective = flows.bipartite(num_classes=3, length=4), Local()
        >>> objective.prepare(flow)
        >>> y = torch.randint(3, (2, 4))
        >>> torch.allclose(objective(flow, y), flow.log_prob(y))
        True
    """

    def __init__(self, subsample: Literal["none", "levels", "transforms"] = "none") -> None:
        super().__init__()
        check_choice("subsample", subsample, ("none", "levels", "transforms"))
        self.subsample = subsample

    def extra_repr(self) -> str:
        return f"subsample={self.subsample!r}"

    def evaluate(
        self, flow: DiscreteFlow, y: Tensor, context: Tensor | None, progress: float | None
    ) -> Tensor:
        if self.subsample == "transforms" and len(flow.conditional_transforms) > 1:
            return self._one_transform(flow, y, context)
        one_level = self.subsample != "none"
        conditional = flow.conditional_transforms
        number = len(conditional)
        total = torch.zeros(len(y), device=y.device)
        weight: Tensor | None = None
        for transform in reversed(flow.transforms):
            if transform.ordering is None:
                y, weight = transform.inverse(y, context), None
                continue
            number -= 1
            last = transform is flow.transforms[0] and flow.base.scores_parts
            y, zeros, weight = self.step(
                conditional[number], number, y, context, one_level=one_level, need_all=not last
            )
            total = total + zeros
        return self._base(flow, y, context, weight) + total

    def _base(
        self, flow: DiscreteFlow, x: Tensor, context: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        if self.subsample != "none":
            return flow.base.sampled_log_prob(x, context, weight)
        log_prob = flow.base.log_prob(x, context)
        return (log_prob if weight is None else log_prob * weight).sum(dim=-1)

    def _one_transform(self, flow: DiscreteFlow, y: Tensor, context: Tensor | None) -> Tensor:
        """Trains one transform an example, and the base on the examples that reach it."""
        conditional = flow.conditional_transforms
        number = count = len(conditional)
        choice = torch.randint(count, y.shape[:1], device=y.device)
        total = torch.zeros(len(y), device=y.device)
        rows = torch.arange(len(y), device=y.device)
        weight: Tensor | None = None
        for transform in reversed(flow.transforms):
            part = None if context is None else context[rows]
            if transform.ordering is None:
                y = transform.inverse(y, part)
                continue
            number -= 1
            chosen = choice[rows] == number
            last = transform is flow.transforms[0] and flow.base.scores_parts
            trained = y[chosen]
            if len(trained):
                own = None if part is None else part[chosen]
                trained, zeros, weight = self.step(
                    conditional[number], number, trained, own, one_level=True, need_all=not last
                )
                total = _add_at(total, rows[chosen], count * zeros)
            else:
                total = total + self.idle(transform, number)
            if number == 0:
                # Only the examples that chose this transform go on to the base.
                rows, y = rows[chosen], trained
                continue
            with torch.no_grad():
                part = None if part is None else part[~chosen]
                rows, y = rows[~chosen], transform.inverse(y[~chosen], part)
        if not len(rows):
            return total + idle(flow.base)
        part = None if context is None else context[rows]
        return _add_at(total, rows, count * self._base(flow, y, part, weight))
