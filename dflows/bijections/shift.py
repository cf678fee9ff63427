"""The modular shift."""

import torch
from torch import Tensor

from dflows import modular
from dflows.bijections.bijection import INITIAL_MARGIN, SoftmaxBijection
from dflows.categorical import select_log_prob
from dflows.gradients import GradientRule
from dflows.representations import full_precision, is_one_hot, to_one_hot

__all__ = ["ModularShift"]


class ModularShift(SoftmaxBijection):
    r"""Creates a shift modulo K, the location-scale map without a scale.

    .. math:: y = (\mu + x) \bmod K

    Args:
        num_classes: K, at least 2.
        rule: How the choice of the location is differentiated; by default the paper's
            straight-through gradient.

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

    needs_target = False

    def __init__(self, num_classes: int, rule: GradientRule | None = None) -> None:
        super().__init__(num_classes, num_classes, rule)

    def initial_logits(self) -> Tensor:
        return INITIAL_MARGIN * to_one_hot(torch.tensor(0), self.num_classes)

    def choice_logits(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (self._checked(logits),)

    def chosen(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (self._largest(full_precision(logits)),)

    def map_by(self, value: Tensor, choices: tuple[Tensor, ...], *, inverse: bool) -> Tensor:
        (loc,) = choices
        if not is_one_hot(value):
            return torch.remainder(value - loc if inverse else value + loc, self.num_classes)
        no_scale = torch.ones(loc.shape[:-1], dtype=torch.long, device=loc.device)
        mapping = modular.affine_inverse if inverse else modular.affine
        return mapping(value, loc, no_scale, self.num_classes)

    def local_log_likelihood(
        self, y: Tensor, logits: Tensor, target: Tensor | None = None
    ) -> Tensor:
        # Cross-entropy: the most probable class is moved to class 0, where the base is peaked.
        logits = self._checked(logits)
        return select_log_prob(logits.log_softmax(dim=-1), y)
