"""Layerwise training on the likelihood of the whole stack: the local expectation gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dflows.arguments import check_temperature
from dflows.bijections import Bijection
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.objectives.layerwise import Layerwise
from dflows.objectives.local import Step

__all__ = ["LocalExpectationGradient"]


class LocalExpectationGradient(Layerwise):
    r"""Creates layerwise training followed by local expectation gradients.

    In the first round every transform learns by itself, as with
    :class:`~dflows.objectives.Layerwise`. That cannot teach a transform which x suits the
    transforms beneath it, so in further rounds it learns from the likelihood of the whole stack.
    For one dimension at a time, with all others fixed, the likelihood of every class is computed
    exactly. Several maps of the dimension are sampled from a policy, which then learns to prefer
    those whose x was likelier than the mean of the others',

    .. math::

        \nabla \approx \frac{1}{S - 1} \sum_s (R_{x_s} - \bar R)\, \nabla \log \pi(b_s), \qquad
        R_x = \log q(\ldots, x_{d-1}, x, x_{d+1}, \ldots).

    The policy is the softmax of the logits over the temperature; for rank permutations it is the
    order of choices without replacement (Plackett and Luce). A step evaluates everything beneath
    D·K times an example: it is for few dimensions of few classes, and needs many examples of every
    context.

    Args:
        rounds: Rounds of these stages, after the local round.
        temperature: Temperature of the policy. Higher ones explore more, and blur differences
            between logits below them.
        num_samples: S, the number of sampled maps of every dimension, at least 2.

    Raises:
        UserError: If a number is out of range.

    References:
        | Local Expectation Gradients for Black Box Variational Inference (Titsias &
          Lázaro-Gredilla, 2015)
        | https://arxiv.org/abs/1503.01494
        | Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool et al., 2019)

    Example:
        >>> from dflows import flows
        >>> LocalExpectationGradient().num_stages(flows.bipartite(num_classes=3, length=4))
        4
    """

    def __init__(self, rounds: int = 1, temperature: float = 0.1, num_samples: int = 8) -> None:
        super().__init__()
        if rounds < 1:
            raise UserError(f"rounds is {rounds}: give at least 1, or train with Layerwise")
        if num_samples < 2:
            raise UserError(
                f"num_samples is {num_samples}: give at least 2, to compare each with the others"
            )
        self.rounds = 1 + rounds
        self.temperature = check_temperature(temperature)
        self.num_samples = num_samples

    def extra_repr(self) -> str:
        rounds = self.rounds - 1
        return f"{rounds=}, temperature={self.temperature}, num_samples={self.num_samples}"

    def frozen(self, flow: DiscreteFlow, progress: float | None) -> Sequence[nn.Parameter]:
        frozen, targets = [*super().frozen(flow, progress)], [*self.targets.values()]
        further = self.stage(flow, progress) >= len(flow.conditional_transforms)
        return list({id(part): part for part in (*frozen, *further * targets)}.values())

    def learn(
        self,
        flow: DiscreteFlow,
        position: int,
        number: int,
        y: Tensor,
        context: Tensor | None,
        rounds: int,
    ) -> Step:
        if not rounds:
            return super().learn(flow, position, number, y, context, rounds)
        transform = flow.conditional_transforms[number]
        dimensions = transform.transformed(y)
        bijection = transform.bijection.at(dimensions)
        logits, part = transform.logits(y, dimensions, context), y[:, dimensions]
        with torch.no_grad():
            x = y.index_copy(1, dimensions, bijection.inverse(part, logits))
            values = _values(flow, position, x, dimensions, context)
        zeros = self._policy(bijection, part, logits, values)
        return Step(x, zeros + self.idle(None, number))

    def _policy(self, bijection: Bijection, y: Tensor, logits: Tensor, values: Tensor) -> Tensor:
        """Computes zeros (N,) with the policy's gradient.

        Args:
            bijection: The map of these dimensions.
            y: Indices (N, n).
            logits: Logits (N, n, num_logits).
            values: Log-likelihoods (N, n, K) beneath, for every x of a dimension.
        """
        x, log_policy = bijection.sample_inverse(y, logits, self.num_samples, self.temperature)
        rewards = values.expand(self.num_samples, *values.shape)
        rewards = rewards.gather(-1, x.unsqueeze(-1)).squeeze(-1)
        better = (rewards - rewards.mean(dim=0)) / (self.num_samples - 1)
        total = (better.to(log_policy.dtype) * log_policy).sum(dim=(0, -1))
        return total - total.detach()


def _values(
    flow: DiscreteFlow,
    position: int,
    x: Tensor,
    dimensions: Tensor,
    context: Tensor | None,
) -> Tensor:
    """Computes log-likelihoods (N, n, K) beneath a transform, for every x of some dimensions.

    In the place of a class that a dimension has not stands its last one.
    """
    num_classes = flow.num_classes
    count = len(dimensions) * num_classes
    changed = x.unsqueeze(1).repeat(1, count, 1).unflatten(1, (-1, num_classes))
    classes = torch.arange(num_classes, device=x.device)
    numbers = torch.arange(len(dimensions), device=x.device)
    most = flow.classes.numbers.to(x.device)[dimensions].unsqueeze(-1) - 1
    changed[:, numbers, :, dimensions] = classes.minimum(most).unsqueeze(1)
    rows = None if context is None else context.repeat_interleave(count, dim=0)
    value = changed.flatten(0, 2)
    for beneath in reversed(flow.transforms[:position]):
        value = beneath.inverse(value, rows)
    log_prob = flow.base.log_prob(value, rows).sum(dim=-1)
    return log_prob.unflatten(0, (len(x), -1, num_classes))
