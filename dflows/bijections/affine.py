"""The modular location-scale map."""

import torch
from torch import Tensor

from dflows import modular
from dflows.bijections.bijection import INITIAL_MARGIN, SoftmaxBijection
from dflows.gradients import GradientRule
from dflows.representations import full_precision, to_one_hot

__all__ = ["ModularAffine"]


class ModularAffine(SoftmaxBijection):
    r"""Creates a location-scale map modulo K, the layer of the paper.

    .. math:: y = (\mu + \sigma x) \bmod K

    The first half of the logits chooses :math:`\mu`, the second :math:`\sigma`; those of scales
    that are no units are masked, so that every choice is a bijection.

    Args:
        num_classes: K, at least 2.
        prime: Whether to compute modulo the next prime M, so that every scale but 0 is a unit. The
            residues K..M-1 are walked over (:mod:`dflows.modular`): they have no mass and are
            never generated.
        rule: How the choices of location and scale are differentiated; by default the paper's
            straight-through gradient.

    Raises:
        UserError: If K is below 2.

    References:
        | Discrete Flows (Tran et al., 2019)
        | https://arxiv.org/abs/1905.10347

    Example:
        >>> affine = ModularAffine(6)
        >>> affine.modulus, int(affine.unit.sum())
        (6, 2)
        >>> affine = ModularAffine(6, prime=True)
        >>> affine.modulus, int(affine.unit.sum())
        (7, 6)
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.randn(6, affine.num_logits)[:1].expand(6, -1)
        >>> affine(torch.arange(6), logits)
        tensor([4, 3, 2, 1, 0, 5])
    """

    needs_target = True
    unit: Tensor
    mask: Tensor

    def __init__(
        self, num_classes: int, prime: bool = False, rule: GradientRule | None = None
    ) -> None:
        modulus = modular.next_prime(num_classes) if prime else num_classes
        super().__init__(num_classes, 2 * modulus, rule)
        self.modulus = modulus
        unit = modular.unit_mask(modulus)
        self.register_buffer("unit", unit, persistent=False)
        mask = torch.zeros(modulus).masked_fill(~unit, -torch.inf)
        self.register_buffer("mask", mask, persistent=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, modulus={self.modulus}"

    def initial_logits(self) -> Tensor:
        return INITIAL_MARGIN * to_one_hot(torch.tensor([0, 1]), self.modulus).flatten()

    def _split(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = full_precision(logits).chunk(2, dim=-1)
        # Added and not filled in: NaN and +inf stay visible behind the mask.
        return loc, scale + self.mask.to(scale.dtype)

    def choice_logits(self, logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._checked(part) for part in self._split(logits))

    def chosen(self, logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._largest(part) for part in self._split(logits))

    def map_by(self, value: Tensor, choices: tuple[Tensor, ...], *, inverse: bool) -> Tensor:
        mapping = modular.affine_inverse if inverse else modular.affine
        loc, scale = choices
        return mapping(value, loc, scale, self.num_classes, modulus=self.modulus)

    def local_log_likelihood(
        self, y: Tensor, logits: Tensor, target: Tensor | None = None
    ) -> Tensor:
        # The likelihood of a mixture over locations at the chosen scale, and of one over scales at
        # the chosen location: one map of M entries each, where the joint mixture takes M·φ(M).
        if target is None:
            raise ValueError("ModularAffine's local objective needs the target's log-probabilities")
        target = full_precision(target)
        loc_logits, scale_logits = self.choice_logits(logits)
        loc, scale = loc_logits.argmax(dim=-1), scale_logits.argmax(dim=-1)
        residues = torch.arange(self.modulus, device=y.device)
        scales = torch.where(self.unit, residues, 1)

        def mixture(choices: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
            x = modular.affine_inverse(
                y.unsqueeze(-1), loc, scale, self.num_classes, modulus=self.modulus
            )
            return (choices.log_softmax(dim=-1) + target[x]).logsumexp(dim=-1)

        return mixture(loc_logits, residues, scale.unsqueeze(-1)) + mixture(
            scale_logits, loc.unsqueeze(-1), scales
        )
