r"""How learning passes the discrete choice.

The likelihood of a discrete flow has no log-determinant: every transform returns zeros of the
batch shape in its place. This zero is where learning happens. Its value never changes, but it is a
node of the graph, and so it carries gradients down and up:

- its own gradient is :math:`c = \partial\text{loss}/\partial\log p` of every example, whatever
  means, accumulation, loss scaling or averaging over ranks came after. The posterior rule divides
  by it to recover the log-likelihood's gradient exactly;
- the local objective adds :math:`\ell - \text{stop}(\ell)` to it: nothing in value, and the
  gradient of each flow's own likelihood.

So the same line trains with every estimator: ``(-flow.objective(y).mean()).backward()``.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dflows.bijections import Bijection
from dflows.errors import UserError
from dflows.representations import is_one_hot, to_indices, to_one_hot

__all__ = ["Draw", "Estimator", "LocalObjective", "PosteriorRule", "SoftmaxStraightThrough"]

Draw = Literal["all", "level", "flow"]


class Estimator(nn.Module, ABC):
    """Creates an estimator of the gradient of the log-likelihood with respect to logits."""

    through: ClassVar[bool]
    """Whether the gradient crosses flows, which then run on one-hot vectors while training."""
    draw: Draw = "all"
    """What is trained in one step: all flows and levels, one level of each flow, or one flow."""

    def check(self, bijection: Bijection) -> None:
        """Refuses a bijection that the estimator cannot train.

        Raises:
            UserError: If it cannot.
        """

    @abstractmethod
    def inverse(
        self, bijection: Bijection, y: Tensor, logits: Tensor, ladj: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Maps data → base, with the estimator's gradient.

        Args:
            bijection: The map of one dimension.
            y: One-hot vectors (…, D, K) where `through`, else indices (…, D) or one-hot vectors.
            logits: Logits (…, D, num_logits).
            ladj: Log-determinants (…), zeros.
            target: Log-probabilities (K,) of the x to aim at, where the bijection needs them.

        Returns:
            The value in the representation of `y`, and log-determinants (…), zeros.
        """

    @abstractmethod
    def forward_map(
        self, bijection: Bijection, x: Tensor, logits: Tensor, ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Maps base → data on one-hot vectors (…, D, K), as :meth:`inverse` does data → base."""


class _Through(Estimator):
    """Estimators that hand a gradient on, by a rule from logits to one-hot vectors."""

    through = True

    @abstractmethod
    def choose(self, logits: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        """Maps logits (…, D, M) to one-hot vectors of their argmax, and log-determinants (…)."""

    def inverse(
        self, bijection: Bijection, y: Tensor, logits: Tensor, ladj: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return bijection.inverse_through(y, logits, ladj, self.choose)

    def forward_map(
        self, bijection: Bijection, x: Tensor, logits: Tensor, ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        return bijection.forward_through(x, logits, ladj, self.choose)


class SoftmaxStraightThrough(_Through):
    r"""Creates the paper's estimator: argmax forward, the gradient of a softmax backward.

    With :math:`p = \mathrm{softmax}(\theta / \tau)` and A the log-likelihood's gradient with
    respect to the one-hot vector, the logits receive :math:`p \odot (A - p^\top A) / \tau`.

    Arguments:
        temperature: :math:`\tau`; the paper uses 0.1.

    Raises:
        UserError: If the temperature is not positive.

    References:
        | Discrete Flows (Tran et al., 2019), section 4.3
        | https://arxiv.org/abs/1905.10347

    Example:
        >>> logits = torch.tensor([[0.0, 1.0]], requires_grad=True)
        >>> one_hot, _ = SoftmaxStraightThrough(1.0).choose(logits, torch.zeros(()))
        >>> one_hot[0, 0].backward()
        >>> logits.grad
        tensor([[ 0.1966, -0.1966]])
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"temperature is {temperature}: give a positive number")
        self.temperature = temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def choose(self, logits: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        soft = (logits / self.temperature).softmax(dim=-1)
        hard = to_one_hot(logits.argmax(dim=-1), logits.shape[-1], soft.dtype)
        # Added to the exact one-hot vector, soft - soft is 0 to the last bit.
        return hard + (soft - soft.detach()), ladj


class _Posterior(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits)
        return to_one_hot(logits.argmax(dim=-1), logits.shape[-1], logits.dtype), ladj.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        (logits,) = ctx.saved_tensors
        example = weight[..., None, None]
        used = example != 0
        log_likelihood = grad / torch.where(used, example, 1)
        difference = (logits + log_likelihood).softmax(dim=-1) - logits.softmax(dim=-1)
        return torch.where(used, example * difference, 0), weight


class PosteriorRule(_Through):
    r"""Creates the posterior rule: the gradient of the log of a mixture's likelihood.

    With :math:`p = \mathrm{softmax}(\theta)` and A the gradient of the example's log-likelihood
    with respect to the one-hot vector, the logits receive :math:`q - p`, with
    :math:`q = \mathrm{softmax}(\theta + A)` the posterior of the choice. For the flow next to a
    factorized base this is exactly the gradient of
    :math:`\log \sum_k p_k\, p_\mathrm{base}(x(k))`; further up it is linearised.

    The straight-through gradient is that of the expected log-likelihood: as slow as a policy
    gradient over K classes, where the posterior is as quick as cross-entropy.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0]], requires_grad=True)
        >>> one_hot, ladj = PosteriorRule().choose(logits, torch.zeros(()))
        >>> log_prob = (one_hot * torch.tensor([0.8, 0.2]).log()).sum() + ladj
        >>> log_prob.backward()
        >>> logits.grad
        tensor([[ 0.3264, -0.3264]])
        >>> p = logits.detach().softmax(-1).requires_grad_()
        >>> (p * torch.tensor([0.8, 0.2])).sum().log().backward()
        >>> p.detach() * (p.grad - (p.detach() * p.grad).sum())
        tensor([[ 0.3264, -0.3264]])
    """

    def check(self, bijection: Bijection) -> None:
        if not bijection.categorical:
            raise UserError(
                f"PosteriorRule weighs the classes of a softmax, and {type(bijection).__name__} "
                "does not choose by one: train it with LocalObjective or SoftmaxStraightThrough"
            )

    def choose(self, logits: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        one_hot, ladj = _Posterior.apply(logits, ladj)
        return one_hot, ladj


class LocalObjective(Estimator):
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

    through = False

    def __init__(self, draw: Draw = "all") -> None:
        super().__init__()
        if draw not in ("all", "level", "flow"):
            raise UserError(f"draw is {draw!r}: give 'all', 'level' or 'flow'")
        self.draw = draw

    def extra_repr(self) -> str:
        return f"draw={self.draw!r}"

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
