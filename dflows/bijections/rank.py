"""The permutation by rank."""

import torch
from torch import Tensor

from dflows.arguments import check_temperature
from dflows.bijections.bijection import INITIAL_MARGIN, Bijection
from dflows.categorical import select_log_prob
from dflows.gradients import gumbel_like
from dflows.representations import is_one_hot, to_indices, to_one_hot

__all__ = ["RankPermutation"]


def _finite(logits: Tensor) -> Tensor:
    """Returns logits with the lowest number in place of -inf: differences of two are no NaN."""
    return logits.clamp(min=torch.finfo(logits.dtype).min)


class RankPermutation(Bijection):
    r"""Creates a permutation of the K classes by the rank of their logits.

    .. math:: x = \#\{c : \theta_c > \theta_y\}, \qquad y = \text{the class whose rank is } x

    Equal logits rank in the order of their classes. Where the location-scale map chooses among
    :math:`K \varphi(K)` of the K! permutations, this reaches all; ranking by a network's own
    probabilities makes the entropy of x the smallest that any bijection of one variable can.

    Args:
        num_classes: K, at least 2.
        temperature: Width of the soft ranks, whose gradient one-hot vectors have in place of that
            of the ranks. The local objective does not use it.

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

    needs_target = False

    def __init__(self, num_classes: int, temperature: float = 1.0) -> None:
        super().__init__(num_classes, num_logits=num_classes)
        self.temperature = check_temperature(temperature)

    def initial_logits(self) -> Tensor:
        return INITIAL_MARGIN * torch.linspace(1, 0, self.num_classes)

    @staticmethod
    def _order(logits: Tensor) -> Tensor:
        return logits.argsort(dim=-1, descending=True, stable=True)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        logits = self._checked(logits)
        order = self._order(logits)
        if not is_one_hot(x):
            return order.gather(-1, x.unsqueeze(-1)).squeeze(-1)
        y = x.gather(-1, order.argsort(dim=-1))
        soft = (-self._distances(y, logits).abs() / self.temperature).softmax(dim=-1)
        return y + (soft - soft.detach()).to(y.dtype)

    def inverse(self, y: Tensor, logits: Tensor) -> Tensor:
        logits = self._checked(logits)
        if not is_one_hot(y):
            y = y.unsqueeze(-1)
            logit = logits.gather(-1, y)
            classes = torch.arange(self.num_classes, device=y.device)
            before = (logits > logit) | ((logits == logit) & (classes < y))
            return before.sum(dim=-1)
        x = y.gather(-1, self._order(logits))
        rank = to_indices(x)
        soft_rank = self._distances(y, logits) / self.temperature
        soft_rank = soft_rank.sigmoid().sum(dim=-1, keepdim=True)
        # The derivative of a function of the rank, by the difference between its neighbours.
        above, below = (rank + 1).clamp(max=self.num_classes - 1), (rank - 1).clamp(min=0)
        ends = [to_one_hot(end, self.num_classes, x.dtype) for end in (above, below)]
        slope = (ends[0] - ends[1]) / (above - below).unsqueeze(-1)
        return x + (soft_rank - soft_rank.detach()).to(x.dtype) * slope

    @staticmethod
    def _distances(y: Tensor, logits: Tensor) -> Tensor:
        """Computes the logits less that of the class of one-hot vectors, all of them finite."""
        logits = _finite(logits)
        return logits - logits.gather(-1, to_indices(y).unsqueeze(-1))

    def sample_inverse(
        self, y: Tensor, logits: Tensor, num_samples: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        # Sorted with Gumbel noise, classes are in the order of choices without replacement.
        scaled = _finite(self._checked(logits) / temperature).expand(num_samples, *logits.shape)
        order = self._order(scaled.detach() + gumbel_like(scaled))
        x = order.argsort(dim=-1).gather(-1, y.expand(num_samples, *y.shape).unsqueeze(-1))
        chosen = scaled.gather(-1, order)
        left = chosen.flip(-1).logcumsumexp(dim=-1).flip(-1)
        return x.squeeze(-1), (chosen - left).sum(dim=-1)

    def local_log_likelihood(
        self, y: Tensor, logits: Tensor, target: Tensor | None = None
    ) -> Tensor:
        logits = self._checked(logits)
        return select_log_prob(logits.log_softmax(dim=-1), y)
