"""The location-scale map that is matched with a distribution."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dflows import modular
from dflows.bijections.bijection import INITIAL_MARGIN, Bijection, Choose
from dflows.representations import to_one_hot

__all__ = ["MatchedAffine"]


class _Map(torch.autograd.Function):
    """One of C maps of one-hot vectors, with the gradient of the form that is linear in each."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, choice: Tensor, table: Tensor) -> Tensor:
        indices, chosen = value.argmax(dim=-1), choice.argmax(dim=-1)
        ctx.save_for_backward(indices, chosen, table)
        ctx.dtypes = value.dtype, choice.dtype
        return to_one_hot(table[chosen, indices], value.shape[-1], value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        indices, chosen, table = ctx.saved_tensors
        of_value = grad.gather(-1, table[chosen]).to(ctx.dtypes[0])
        of_choice = grad.gather(-1, table.T[indices]).to(ctx.dtypes[1])
        return of_value, of_choice, None


class MatchedAffine(Bijection):
    r"""Creates a location-scale map modulo K that is chosen by class probabilities.

    .. math::

        y = (\mu + \sigma x) \bmod K, \qquad
        (\mu, \sigma) = \operatorname*{argmax}_{m,\, s}
            \sum_k p_k \log t\big(s^{-1} (k - m) \bmod K\big)

    The logits are those of the network's own distribution p of y, and the map is the one of all
    :math:`K \varphi(K)` under which x is expected to be likeliest by a distribution t, a parameter
    that all dimensions share. The maps are those of :class:`~dflows.bijections.ModularAffine`,
    whose logits choose location and scale each by itself: to learn probabilities is easier than to
    learn which map is best, and the best one follows. It stands to the location-scale map as
    :class:`~dflows.bijections.RankPermutation` to permutations.

    The local objective learns p by cross-entropy, and t from the x that come out. Estimators of a
    softmax choose among all maps, the expected log-probabilities being their logits. A dimension
    takes :math:`K^2 \varphi(K)` multiplications.

    Arguments:
        num_classes: K, at least 2.

    Raises:
        UserError: If K is below 2.

    Example:
        >>> affine = MatchedAffine(5)
        >>> y, logits = torch.arange(5), torch.tensor([0.1, 0.5, 0.6, 2.0, 0.2]).log()
        >>> x = affine.inverse(y, logits.expand(5, -1))
        >>> x  # class 3 is the likeliest, and class 2 comes next
        tensor([3, 2, 1, 0, 4])
        >>> affine(x, logits.expand(5, -1))
        tensor([0, 1, 2, 3, 4])
    """

    categorical = True
    needs_target = False
    locs: Tensor
    scales: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, num_logits=num_classes)
        scales = modular.units(num_classes)
        self.register_buffer(
            "locs", torch.arange(num_classes).repeat_interleave(len(scales)), False
        )
        self.register_buffer("scales", scales.repeat(num_classes), False)
        # Falling, as the initial logits do: so paired, nothing but the identity is best.
        peaked = to_one_hot(torch.tensor(0), num_classes) * math.log(num_classes)
        self.target = nn.Parameter(peaked + self.initial_logits())

    def initial_logits(self) -> Tensor:
        return INITIAL_MARGIN * torch.linspace(1, 0, self.num_classes)

    def _table(self, inverse: bool) -> Tensor:
        """Tabulates (C, K) what every map, or its inverse, makes of every class."""
        classes = torch.arange(self.num_classes, device=self.locs.device)
        mapping = modular.affine_inverse if inverse else modular.affine
        return mapping(classes, self.locs[:, None], self.scales[:, None], self.num_classes)

    def _scores(self, logits: Tensor) -> Tensor:
        """Computes the expected log-probabilities (…, C) of x under every map."""
        # In bfloat16 scores tie, and which of the tied maps is taken would depend on the batch.
        with torch.autocast(logits.device.type, enabled=False):
            target = self.target.log_softmax(dim=-1)[self._table(inverse=True)]
            return logits.to(target.dtype).softmax(dim=-1) @ target.T

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        best = self._scores(logits).argmax(dim=-1)
        return modular.affine(x, self.locs[best], self.scales[best], self.num_classes)

    def inverse(self, y: Tensor, logits: Tensor) -> Tensor:
        best = self._scores(logits).argmax(dim=-1)
        return modular.affine_inverse(y, self.locs[best], self.scales[best], self.num_classes)

    def forward_through(
        self, x: Tensor, logits: Tensor, ladj: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        choice, ladj = choose(self._scores(logits), ladj)
        y: Tensor = _Map.apply(x, choice, self._table(inverse=False))
        return y, ladj

    def inverse_through(
        self, y: Tensor, logits: Tensor, ladj: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        choice, ladj = choose(self._scores(logits), ladj)
        x: Tensor = _Map.apply(y, choice, self._table(inverse=True))
        return x, ladj

    def local_log_likelihood(self, y: Tensor, logits: Tensor, target: Tensor | None) -> Tensor:
        likelihood = logits.log_softmax(dim=-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        x = self.inverse(y, logits.detach())
        return likelihood + self.target.log_softmax(dim=-1)[x]
