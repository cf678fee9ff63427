"""The modular shift."""

import torch
from torch import Tensor

from dflows import modular
from dflows.bijections.bijection import INITIAL_MARGIN, Bijection, Choose
from dflows.representations import to_one_hot

__all__ = ["ModularShift"]


class ModularShift(Bijection):
    r"""Creates a shift modulo K, the location-scale map without a scale.

    .. math:: y = (\mu + x) \bmod K

    Arguments:
        num_classes: K, at least 2.

    Raises:
        UserError: If K is below 2.

    References:
        | Discrete Flows (Tran et al., 2019)
        | https://arxiv.org/abs/1905.10347

    Example:
        >>> shift = ModularShift(5)
        >>> logits = torch.tensor([[0.0, 0.0, 3.0, 0.0, 0.0]])  # the location is 2
        >>> shift(torch.tensor([4]), logits)
        tensor([1])
    """

    categorical = True
    needs_target = False

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, num_logits=num_classes)

    def initial_logits(self) -> Tensor:
        return INITIAL_MARGIN * to_one_hot(torch.tensor(0), self.num_classes)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return torch.remainder(x + logits.argmax(dim=-1), self.num_classes)

    def inverse(self, y: Tensor, logits: Tensor) -> Tensor:
        return torch.remainder(y - logits.argmax(dim=-1), self.num_classes)

    def forward_through(
        self, x: Tensor, logits: Tensor, ladj: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        loc, ladj = choose(logits, ladj)
        return modular.affine(x, loc, self._no_scale(loc), self.num_classes), ladj

    def inverse_through(
        self, y: Tensor, logits: Tensor, ladj: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        loc, ladj = choose(logits, ladj)
        return modular.affine_inverse(y, loc, self._no_scale(loc), self.num_classes), ladj

    @staticmethod
    def _no_scale(loc: Tensor) -> Tensor:
        return torch.ones(loc.shape[:-1], dtype=torch.long, device=loc.device)

    def local_log_likelihood(self, y: Tensor, logits: Tensor, target: Tensor | None) -> Tensor:
        # Cross-entropy: the most probable class is moved to class 0, where the base is peaked.
        return logits.log_softmax(dim=-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
