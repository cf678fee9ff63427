r"""Rules that sample the choice while training.

They estimate the gradient of :math:`\mathbb{E}\,\log p(y)`, the mean over maps that are sampled
from the softmax of their logits. A sampled map is a bijection as much as the likeliest one, so that
every value is a log-likelihood, of the flow that was sampled. In evaluation mode and on indices the
choice is the largest logit.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflows.arguments import check_temperature
from dflows.gradients.rule import GradientRule, gumbel_like
from dflows.representations import to_one_hot

__all__ = ["GumbelStraightThrough", "ReinMax"]


class _Stochastic(GradientRule):
    stochastic = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def forward(self, logits: Tensor) -> Tensor:
        perturbed = logits
        if self.training:  # the argmax with Gumbel noise is a sample from the softmax
            perturbed = logits + gumbel_like(logits)
        hard = to_one_hot(perturbed.argmax(dim=-1), logits.shape[-1], logits.dtype)
        return self._with_gradient(hard, logits, perturbed)

    @abstractmethod
    def _with_gradient(self, hard: Tensor, logits: Tensor, perturbed: Tensor) -> Tensor:
        """Returns the sampled one-hot vectors, with the gradient of the rule."""


class GumbelStraightThrough(_Stochastic):
    r"""Creates the straight-through Gumbel-softmax: a sample forward, its own softmax backward.

    With Gumbel noise g, forward is the argmax of :math:`\theta + g`, backward the gradient of
    :math:`\mathrm{softmax}((\theta + g) / \tau)`. The lower the temperature, the smaller the bias
    and the larger the variance.

    Args:
        temperature: :math:`\tau`.

    Raises:
        UserError: If the temperature is not positive.

    References:
        | Categorical Reparameterization with Gumbel-Softmax (Jang et al., 2016), section 2.2
        | https://arxiv.org/abs/1611.01144

    Example:
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.tensor([0.0, 1.0]).expand(10_000, 1, 2)
        >>> rule = GumbelStraightThrough()
        >>> rule(logits).mean(0).sub(logits[0].softmax(-1)).abs().max() < 0.02
        tensor(True)
        >>> rule.eval()(logits).mean(0)
        tensor([[0., 1.]])
    """

    def _with_gradient(self, hard: Tensor, logits: Tensor, perturbed: Tensor) -> Tensor:
        soft = (perturbed / self.temperature).softmax(dim=-1)
        return hard + (soft - soft.detach())


class _SecondOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hard: Tensor, logits: Tensor, temperature: float) -> Tensor:
        middle = (hard + (logits / temperature).softmax(dim=-1)) / 2
        ctx.save_for_backward(middle, logits.softmax(dim=-1))
        return hard.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        middle, p = ctx.saved_tensors

        def through(weight: Tensor) -> Tensor:
            return weight * (grad - (weight * grad).sum(dim=-1, keepdim=True))

        return None, 2 * through(middle) - through(p) / 2, None


class ReinMax(_Stochastic):
    r"""Creates ReinMax: a sample forward, a gradient of second order backward.

    With :math:`p = \mathrm{softmax}(\theta)`, a sample D from it,
    :math:`\pi = (D + \mathrm{softmax}(\theta / \tau)) / 2` and A the log-likelihood's gradient at
    D, the logits receive :math:`2 \pi \odot (A - \pi^\top A) - \tfrac12 p \odot (A - p^\top A)`. At
    temperature 1 its mean is the exact gradient of the expectation of any function that is
    quadratic in D, where straight-through's is exact for linear ones.

    Args:
        temperature: :math:`\tau`.

    Raises:
        UserError: If the temperature is not positive.

    References:
        | Bridging Discrete and Backpropagation: Straight-Through and Beyond (Liu et al., 2023)
        | https://arxiv.org/abs/2304.08612

    Example:
        >>> logits = torch.tensor([[0.0, 1.0]], requires_grad=True)
        >>> one_hot = ReinMax().eval()(logits)
        >>> one_hot[0, 0].backward()
        >>> logits.grad
        tensor([[ 0.1345, -0.1345]])
    """

    def _with_gradient(self, hard: Tensor, logits: Tensor, perturbed: Tensor) -> Tensor:
        sampled: Tensor = _SecondOrder.apply(hard, logits, self.temperature)
        return sampled
