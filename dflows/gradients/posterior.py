"""The posterior rule."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflows.gradients.rule import GradientRule
from dflows.gradients.weights import current_weights
from dflows.representations import to_one_hot

__all__ = ["PosteriorRule"]


class _Posterior(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(logits)
        one_hot = to_one_hot(logits.argmax(dim=-1), logits.shape[-1], logits.dtype)
        return one_hot, None if zeros is None else zeros.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        (logits,) = ctx.saved_tensors
        if weight is None:
            return (logits + grad).softmax(dim=-1) - logits.softmax(dim=-1), None
        example = weight.reshape(_example_shape(logits))
        used = example != 0
        log_likelihood = grad / torch.where(used, example, 1)
        difference = (logits + log_likelihood).softmax(dim=-1) - logits.softmax(dim=-1)
        return torch.where(used, example * difference, 0), weight


def _example_shape(logits: Tensor) -> tuple[int, ...]:
    """Returns the shape of one number an example, against logits (…, n, M)."""
    return *logits.shape[:-2], *(1,) * min(logits.ndim, 2)


class PosteriorRule(GradientRule):
    r"""Creates the posterior rule: the gradient of the log of a mixture's likelihood.

    With :math:`p = \mathrm{softmax}(\theta)` and A the gradient of the example's log-likelihood
    with respect to the one-hot vector, the logits receive :math:`q - p`, with
    :math:`q = \mathrm{softmax}(\theta + A)` the posterior of the choice. For the transform next to
    a factorized base this is exactly the gradient of
    :math:`\log \sum_k p_k\, p_\mathrm{base}(x(k))`; further up it is linearised.

    The straight-through gradient is that of the expected log-likelihood: as slow as a policy
    gradient over K classes, where the posterior is as quick as cross-entropy.

    The rule has to know what one example weighs in the loss: evaluate it within
    :func:`~dflows.gradients.example_weights`, as :class:`dflows.DiscreteFlow` does. Elsewhere every
    example weighs 1.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0]], requires_grad=True)
        >>> one_hot = PosteriorRule()(logits)
        >>> (one_hot * torch.tensor([0.8, 0.2]).log()).sum().backward()
        >>> logits.grad
        tensor([[ 0.3264, -0.3264]])
        >>> p = logits.detach().softmax(-1).requires_grad_()
        >>> (p * torch.tensor([0.8, 0.2])).sum().log().backward()
        >>> p.detach() * (p.grad - (p.detach() * p.grad).sum())
        tensor([[ 0.3264, -0.3264]])
    """

    def forward(self, logits: Tensor) -> Tensor:
        weights = current_weights()
        if weights is None or not (torch.is_grad_enabled() and logits.requires_grad):
            one_hot: Tensor = _Posterior.apply(logits, None)[0]
            return one_hot
        zeros = weights.zeros(logits, tuple(logits.shape[:-2]))
        one_hot, zeros = _Posterior.apply(logits, zeros)
        weights.hand_on(zeros)
        return one_hot
