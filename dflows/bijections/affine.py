"""The modular location-scale map."""

import torch
from torch import Tensor

from dflows import modular
from dflows.bijections.bijection import INITIAL_MARGIN, Bijection, Choose
from dflows.representations import to_one_hot

__all__ = ["ModularAffine"]


class ModularAffine(Bijection):
    r"""Creates a location-scale map modulo K, the layer of the paper.

    .. math:: y = (\mu + \sigma x) \bmod K

    The first half of the logits chooses :math:`\mu`, the second :math:`\sigma`; those of scales
    that are no units are masked, so that every choice is a bijection.

    Arguments:
        num_classes: K, at least 2.
        prime: Whether to compute modulo the next prime M, so that every scale but 0 is a unit. The
            residues K..M-1 are walked over (:mod:`dflows.modular`): they have no mass and are
            never generated.

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

    categorical = True
    needs_target = True
    unit: Tensor

    def __init__(self, num_classes: int, prime: bool = False) -> None:
        modulus = modular.next_prime(num_classes) if prime else num_classes
        super().__init__(num_classes, num_logits=2 * modulus)
        self.modulus = modulus
        self.register_buffer("unit", modular.unit_mask(modulus), persistent=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, modulus={self.modulus}"

    def initial_logits(self) -> Tensor:
        return INITIAL_MARGIN * to_one_hot(torch.tensor([0, 1]), self.modulus).flatten()

    def _split(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = logits.chunk(2, dim=-1)
        return loc, scale.masked_fill(~self.unit, -torch.inf)

    def _parameters_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self._split(logits)
        return loc.argmax(dim=-1), scale.argmax(dim=-1)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        parameters = self._parameters_of(logits)
        return modular.affine(x, *parameters, self.num_classes, modulus=self.modulus)

    def inverse(self, y: Tensor, logits: Tensor) -> Tensor:
        parameters = self._parameters_of(logits)
        return modular.affine_inverse(y, *parameters, self.num_classes, modulus=self.modulus)

    def _choose(
        self, logits: Tensor, ladj: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor, Tensor]:
        loc, scale = self._split(logits)
        loc, ladj = choose(loc, ladj)
        scale, ladj = choose(scale, ladj)
        return loc, scale, ladj

    def forward_through(
        self, x: Tensor, logits: Tensor, ladj: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        loc, scale, ladj = self._choose(logits, ladj, choose)
        return modular.affine(x, loc, scale, self.num_classes, modulus=self.modulus), ladj

    def inverse_through(
        self, y: Tensor, logits: Tensor, ladj: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        loc, scale, ladj = self._choose(logits, ladj, choose)
        return modular.affine_inverse(y, loc, scale, self.num_classes, modulus=self.modulus), ladj

    def local_log_likelihood(self, y: Tensor, logits: Tensor, target: Tensor | None) -> Tensor:
        # The likelihood of a mixture over locations at the chosen scale, and of one over scales at
        # the chosen location: one map of M entries each, where the joint mixture takes M·φ(M).
        if target is None:
            raise ValueError("ModularAffine's local objective needs the target's log-probabilities")
        loc_logits, scale_logits = self._split(logits)
        loc, scale = self._parameters_of(logits)
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
