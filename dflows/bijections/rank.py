"""The permutation by rank."""

import math

import torch
from torch import Tensor

from dflows.bijections.bijection import INITIAL_MARGIN, Bijection, Choose, gumbel_like
from dflows.errors import UserError
from dflows.representations import to_indices, to_one_hot

__all__ = ["RankPermutation"]


class RankPermutation(Bijection):
    r"""Creates a permutation of the K classes by the rank of their logits.

    .. math:: x = \#\{c : \theta_c > \theta_y\}, \qquad y = \text{the class whose rank is } x

    Equal logits rank in the order of their classes. Where the location-scale map chooses among
    :math:`K \varphi(K)` of the K! permutations, this reaches all; ranking by a network's own
    probabilities makes the entropy of x the smallest that any bijection of one variable can.

    Arguments:
        num_classes: K, at least 2.
        temperature: Width of the soft ranks whose gradient stands in for that of the ranks, where
            an estimator passes a gradient through the flow. The local objective does not use it.

    Raises:
        UserError: If K is below 2, or the temperature is not positive.

    References:
        | SoftSort: A Continuous Relaxation for the argsort Operator (Prillo and Eisenschlos, 2020)
        | https://arxiv.org/abs/2006.16038

    Example:
        >>> rank = RankPermutation(4)
        >>> logits = torch.tensor([0.1, 2.0, 0.3, 0.2]).expand(4, 4)
        >>> rank(torch.arange(4), logits)
        tensor([1, 2, 3, 0])
        >>> rank.inverse(torch.arange(4), logits)
        tensor([3, 0, 1, 2])
    """

    categorical = False
    needs_target = False

    def __init__(self, num_classes: int, temperature: float = 1.0) -> None:
        super().__init__(num_classes, num_logits=num_classes)
        if not 0 < temperature < math.inf:
            raise UserError(f"temperature is {temperature}: give a positive number")
        self.temperature = temperature

    def initial_logits(self) -> Tensor:
        return INITIAL_MARGIN * torch.linspace(1, 0, self.num_classes)

    @staticmethod
    def _order(logits: Tensor) -> Tensor:
        return logits.argsort(dim=-1, descending=True, stable=True)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return self._order(logits).gather(-1, x.unsqueeze(-1)).squeeze(-1)

    def inverse(self, y: Tensor, logits: Tensor) -> Tensor:
        y = y.unsqueeze(-1)
        logit = logits.gather(-1, y)
        classes = torch.arange(self.num_classes, device=y.device)
        before = (logits > logit) | ((logits == logit) & (classes < y))
        return before.sum(dim=-1)

    def forward_through(
        self, x: Tensor, logits: Tensor, ladj: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        order = self._order(logits)
        y = x.gather(-1, order.argsort(dim=-1))
        chosen = logits.gather(-1, to_indices(y).unsqueeze(-1))
        soft = (-(logits - chosen).abs() / self.temperature).softmax(dim=-1)
        return y + (soft - soft.detach()).to(y.dtype), ladj

    def inverse_through(
        self, y: Tensor, logits: Tensor, ladj: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        x = y.gather(-1, self._order(logits))
        rank = to_indices(x)
        chosen = logits.gather(-1, to_indices(y).unsqueeze(-1))
        soft_rank = ((logits - chosen) / self.temperature).sigmoid().sum(dim=-1, keepdim=True)
        # The derivative of a function of the rank, by the difference between its neighbours.
        above, below = (rank + 1).clamp(max=self.num_classes - 1), (rank - 1).clamp(min=0)
        ends = [to_one_hot(end, self.num_classes, x.dtype) for end in (above, below)]
        slope = (ends[0] - ends[1]) / (above - below).unsqueeze(-1)
        return x + (soft_rank - soft_rank.detach()).to(x.dtype) * slope, ladj

    def draw_inverse(
        self, y: Tensor, logits: Tensor, draws: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        # Sorted with Gumbel noise, classes are in the order of choices without replacement.
        scaled = (logits / temperature).expand(draws, *logits.shape)
        order = self._order(scaled.detach() + gumbel_like(scaled))
        x = order.argsort(dim=-1).gather(-1, y.expand(draws, *y.shape).unsqueeze(-1))
        chosen = scaled.gather(-1, order)
        left = chosen.flip(-1).logcumsumexp(dim=-1).flip(-1)
        return x.squeeze(-1), (chosen - left).sum(dim=-1)

    def local_log_likelihood(self, y: Tensor, logits: Tensor, target: Tensor | None) -> Tensor:
        return logits.log_softmax(dim=-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
