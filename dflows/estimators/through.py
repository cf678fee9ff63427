"""Estimators that hand a gradient from flow to flow."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflows.bijections import Bijection
from dflows.estimators.estimator import Estimator, check_positive, check_softmax
from dflows.representations import to_one_hot

__all__ = ["PosteriorRule", "SoftmaxStraightThrough", "Through"]


class Through(Estimator):
    """Creates an estimator that hands a gradient on, by a rule from logits to one-hot vectors."""

    through = True

    @abstractmethod
    def choose(self, logits: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        """Maps logits (…, D, M) to one-hot vectors of the choice, and log-determinants (…).

        The choice is the argmax, or in training mode a drawn one where `draws_maps` says so.
        """

    def inverse(
        self, bijection: Bijection, y: Tensor, logits: Tensor, ladj: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return bijection.inverse_through(y, logits, ladj, self.choose)

    def forward_map(
        self, bijection: Bijection, x: Tensor, logits: Tensor, ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        return bijection.forward_through(x, logits, ladj, self.choose)


class SoftmaxStraightThrough(Through):
    r"""Creates the paper's estimator: argmax forward, the gradient of a softmax backward.

    With :math:`p = \mathrm{softmax}(\theta / \tau)` and A the log-likelihood's gradient with
    respect to the one-hot vector, the logits receive :math:`p \odot (A - p^\top A) / \tau`.

    Arguments:
        temperature: :math:`\tau`; the paper uses 0.1.

    Raises:
        UserError: If the temperature is not positive.

    References:
        | Discrete Flows (Tran et al., 2019), on training by straight-through gradients
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
        self.temperature = check_positive(temperature)

    @property
    def map_temperature(self) -> float:
        return self.temperature

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


class PosteriorRule(Through):
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
        check_softmax(self, bijection)

    def choose(self, logits: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        one_hot, ladj = _Posterior.apply(logits, ladj)
        return one_hot, ladj
