"""The location-scale map that is matched with a distribution."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dflows import modular
from dflows.bijections.bijection import INITIAL_MARGIN, SoftmaxBijection
from dflows.categorical import select_log_prob
from dflows.errors import NonFiniteError
from dflows.gradients import GradientRule
from dflows.representations import (
    full_precision,
    is_at_hand,
    is_one_hot,
    to_one_hot,
    without_autocast,
)

__all__ = ["MatchedAffine"]

BITS = 53
"""Integers of so many bits are exact in float64, and so are their sums in any order."""
WEIGHT_BITS = 26
"""Bits of a class's probability in relation to the largest."""
BLOCK_ENTRIES = {"cpu": 2**18}
"""About how many exact scores are held at once, by the type of the device: what fits a cache."""
MANY_ENTRIES = 2**23
"""The same of other devices: 64 MB."""
SMALLEST_BLOCK = 64
"""Smallest number of rows of a block, since a product of fewer is slow."""


@lru_cache(maxsize=8)
def _table(num_classes: int, inverse: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        locs, scales = (part.to(device)[:, None] for part in _maps(num_classes))
        mapping = modular.affine_inverse if inverse else modular.affine
        return mapping(torch.arange(num_classes, device=device), locs, scales, num_classes)


def _maps(num_classes: int) -> tuple[Tensor, Tensor]:
    """Returns location and scale (C,) of every map."""
    scales = modular.units(num_classes)
    return torch.arange(num_classes).repeat_interleave(len(scales)), scales.repeat(num_classes)


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


class MatchedAffine(SoftmaxBijection):
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

    The map is chosen by sums of integers, which are exact, so that it depends on the logits and on
    t alone, never on the batch or the order of summation: :math:`p_k / \max p` in steps of
    :math:`2^{-26}`, and :math:`\log t` in :math:`2^{27 - L}` steps of its range, with
    :math:`L = \lceil \log_2 K \rceil`. Maps whose expected log-probabilities differ by more than
    :math:`2^{L - 26}` of the range of :math:`\log t` are distinguished (:math:`10^{-6}` of it at
    K = 50); of maps that tie the first is taken, by location and then by scale.

    The local objective learns p by cross-entropy, and t from the x that come out. The gradient rule
    chooses among all maps, the expected log-probabilities being their logits. A dimension takes
    :math:`K^2 \varphi(K)` multiplications.

    Args:
        num_classes: K, at least 2.
        rule: How the choice of the map is differentiated; by default the paper's straight-through
            gradient.

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

    needs_target = False
    locs: Tensor
    scales: Tensor

    def __init__(self, num_classes: int, rule: GradientRule | None = None) -> None:
        super().__init__(num_classes, num_classes, rule)
        locs, scales = _maps(num_classes)
        self.register_buffer("locs", locs, False)
        self.register_buffer("scales", scales, False)
        # Falling, as the initial logits do: so paired, nothing but the identity is best.
        peaked = to_one_hot(torch.tensor(0), num_classes) * math.log(num_classes)
        self.target = nn.Parameter(peaked + self.initial_logits())

    def initial_logits(self) -> Tensor:
        return INITIAL_MARGIN * torch.linspace(1, 0, self.num_classes)

    def _table(self, inverse: bool) -> Tensor:
        """Tabulates (C, K) what every map, or its inverse, makes of every class."""
        return _table(self.num_classes, inverse, self.locs.device)

    def _integers(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Computes what is summed: weights (…, K) of the classes, and steps (K,) of log t."""
        target = self.target.detach().double()
        target = target - target.min()
        largest = target.max()
        if is_at_hand(largest) and not math.isfinite(largest):
            raise NonFiniteError(
                "MatchedAffine's target, a parameter, is not finite. Training has most likely "
                "diverged: lower the learning rate, or clip gradients"
            )
        bits = BITS - WEIGHT_BITS - (self.num_classes - 1).bit_length()
        target = target / largest.clamp(min=torch.finfo(target.dtype).tiny)
        logits = logits.double()
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        return (weights * 2.0**WEIGHT_BITS).round(), (target * 2.0**bits).round()

    @torch.no_grad()
    def _best(self, logits: Tensor, table: Tensor) -> Tensor:
        """Computes the index (…) of the best map by exact sums, given logits that were checked."""
        weights, steps = self._integers(logits.reshape(-1, self.num_classes))
        every = steps[table].T
        entries = BLOCK_ENTRIES.get(logits.device.type, MANY_ENTRIES)
        blocks = weights.split(max(SMALLEST_BLOCK, entries // len(table)))
        best = [(block @ every).max(dim=-1).indices for block in blocks]  # the first that ties
        return torch.cat(best).reshape(logits.shape[:-1])

    def _scores(self, logits: Tensor, table: Tensor) -> Tensor:
        """Computes the expected log-probabilities (…, C) of x under every map."""
        target = full_precision(self.target).log_softmax(dim=-1)[table]
        dtype = torch.promote_types(logits.dtype, target.dtype)
        return logits.to(dtype).softmax(dim=-1) @ target.to(dtype).T

    def choice_logits(self, logits: Tensor) -> tuple[Tensor, ...]:
        logits, table = self._checked(logits), self._table(inverse=True)
        with without_autocast(logits.device.type):
            scores, best = self._scores(logits, table), self._best(logits, table).unsqueeze(-1)
        with torch.no_grad():  # round-off may put another map in front: the exact one overtakes it
            largest, found = scores.max(dim=-1, keepdim=True)
            ahead = largest.nextafter(torch.full_like(largest, torch.inf))
            scores.scatter_(-1, best, torch.where(found == best, largest, ahead))
        return (scores,)

    def chosen(self, logits: Tensor) -> tuple[Tensor, ...]:
        logits = self._checked(logits)
        with without_autocast(logits.device.type):
            return (self._best(logits, self._table(inverse=True)),)

    def map_by(self, value: Tensor, choices: tuple[Tensor, ...], *, inverse: bool) -> Tensor:
        (choice,) = choices
        if is_one_hot(value):
            mapped: Tensor = _Map.apply(value, choice, self._table(inverse))
            return mapped
        mapping = modular.affine_inverse if inverse else modular.affine
        return mapping(value, self.locs[choice], self.scales[choice], self.num_classes)

    def local_log_likelihood(
        self, y: Tensor, logits: Tensor, target: Tensor | None = None
    ) -> Tensor:
        logits = self._checked(logits)
        likelihood = select_log_prob(logits.log_softmax(dim=-1), y)
        x = self.inverse(y, logits.detach())
        return likelihood + full_precision(self.target).log_softmax(dim=-1)[x]
