"""The straight-through rule."""

from torch import Tensor

from dflows.arguments import check_temperature
from dflows.gradients.rule import GradientRule
from dflows.representations import to_one_hot

__all__ = ["SoftmaxStraightThrough"]


class SoftmaxStraightThrough(GradientRule):
    r"""Creates the paper's rule: argmax forward, the gradient of a softmax backward.

    With :math:`p = \mathrm{softmax}(\theta / \tau)` and A the log-likelihood's gradient with
    respect to the one-hot vector, the logits receive :math:`p \odot (A - p^\top A) / \tau`.

    Args:
        temperature: :math:`\tau`; the paper uses 0.1.

    Raises:
        UserError: If the temperature is not positive.

    References:
        | Discrete Flows (Tran et al., 2019), on training by straight-through gradients
        | https://arxiv.org/abs/1905.10347

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 1.0]], requires_grad=True)
        >>> one_hot = SoftmaxStraightThrough(1.0)(logits)
        >>> one_hot[0, 0].backward()
        >>> logits.grad
        tensor([[ 0.1966, -0.1966]])
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    @property
    def choice_temperature(self) -> float:
        return self.temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def forward(self, logits: Tensor) -> Tensor:
        soft = (logits / self.temperature).softmax(dim=-1)
        hard = to_one_hot(logits.argmax(dim=-1), logits.shape[-1], soft.dtype)
        # Added to the exact one-hot vector, soft - soft is 0 to the last bit.
        return hard + (soft - soft.detach())
