"""The factorized base."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from dflows.bases.base import Base, ClosedFormBase
from dflows.categorical import inverse_cdf, select_log_prob
from dflows.classes import NumClasses
from dflows.decoding import Decide
from dflows.errors import UserError
from dflows.orderings import Ordering, alike, untransformed
from dflows.representations import check_logits, is_one_hot

__all__ = ["FactorizedBase"]

PEAK = 0.5
"""Initial probability of class 0 in transformed dimensions."""


class FactorizedBase(ClosedFormBase):
    r"""Creates a base of independent dimensions.

    .. math:: p(x) = \prod_d \mathrm{softmax}(\theta_{g(d)})_{x_d}

    with g(d) the group of a dimension. Transformed dimensions start peaked on class 0: if they
    started at the data's marginal, the identity would be a local optimum. Other dimensions start at
    the marginal.

    A flow adapts it to the orderings of its transforms; until then no dimension counts as
    transformed.

    Args:
        num_classes: K, or one number a dimension.
        length: D.
        sharing: ``levels``: dimensions of equal levels in all orderings, and of equally many
            classes, share a distribution; ``positions``: every dimension has its own.

    Raises:
        UserError: If `sharing` is neither.

    Example:
        >>> from dflows.orderings import Strided
        >>> base = FactorizedBase(num_classes=4, length=6)
        >>> base.adapt([Strided(columns=3)])
        >>> base.groups
        tensor([0, 1, 2, 0, 1, 2])
        >>> base.log_prob(torch.zeros(1, 6, dtype=torch.long)).exp()
        tensor([[0.2500, 0.5000, 0.5000, 0.2500, 0.5000, 0.5000]], grad_fn=<ExpBackward0>)
    """

    scores_parts = True
    takes_context = False
    groups: Tensor
    peaked: Tensor
    absent: Tensor | None

    def __init__(
        self,
        num_classes: NumClasses,
        length: int,
        sharing: Literal["levels", "positions"] = "levels",
    ) -> None:
        super().__init__(num_classes, length)
        if sharing not in ("levels", "positions"):
            raise UserError(f"sharing is {sharing!r}: give 'levels' or 'positions'")
        self.sharing = sharing
        self._orderings: list[Ordering] | None = None
        self._group([])

    def _group(self, orderings: list[Ordering]) -> None:
        own = self.sharing == "positions"
        groups = torch.arange(self.length) if own else alike(orderings, self.length)
        absent = self.classes.absent
        if absent is not None:
            both = torch.stack([groups, self.classes.numbers])
            groups = both.unique(dim=1, return_inverse=True)[1]
            first = [int((groups == group).nonzero()[0]) for group in range(int(groups.max()) + 1)]
            absent = absent[first]
        self.register_buffer("absent", absent, persistent=False)
        peaked = torch.ones(int(groups.max()) + 1, dtype=torch.bool)
        peaked[groups[untransformed(orderings, self.length)]] = False
        self.register_buffer("groups", groups)
        self.register_buffer("peaked", peaked, persistent=False)
        self.logits = nn.Parameter(torch.empty(len(peaked), self.num_classes))
        self.init_from_counts(torch.ones(self.num_classes))

    def adapt(self, orderings: Sequence[Ordering]) -> None:
        orderings = list(orderings)
        if orderings == self._orderings:
            return
        if self._orderings is not None:
            raise UserError(
                f"a FactorizedBase of a flow over {self._orderings} was given to a flow over "
                f"{orderings}: create one for each flow"
            )
        self._orderings = orderings
        if orderings:
            device, dtype = self.logits.device, self.logits.dtype
            self._group(orderings)
            self.to(device, dtype)

    def _group_logits(self) -> Tensor:
        """Returns the logits (G, K) of the groups; -inf of classes that their dimensions have not.

        Raises:
            NonFiniteError: If others are not finite.
        """
        logits = check_logits(self.logits, type(self).__name__)
        return logits if self.absent is None else logits.masked_fill(self.absent, -torch.inf)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, length={self.length}, groups={len(self.peaked)}"

    @property
    def passes(self) -> int:
        return 0

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        table = self._group_logits().log_softmax(dim=-1)
        if is_one_hot(x):
            return select_log_prob(table[self.groups[: x.shape[1]]], x)
        # One flat look-up: a gather of (N, d, K) rows would cost K times as much.
        return table.flatten()[self.groups[: x.shape[1]] * self.num_classes + x]

    def noise(self, num_samples: int, length: int, generator: Generator | None = None) -> Tensor:
        shape = (length, num_samples)
        device = self.logits.device
        return torch.rand(shape, dtype=torch.double, device=device, generator=generator).T

    def from_noise(
        self,
        noise: Tensor,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        fixed_point: bool = False,
        prefix: Tensor | None = None,
        draft: Base | None = None,
    ) -> tuple[Tensor, int]:
        logits = self._group_logits()[self.groups[: noise.shape[1]]]
        x = inverse_cdf(noise, logits=logits, temperature=temperature).contiguous()
        if prefix is not None:
            x[:, : prefix.shape[1]] = prefix
        return x, 0

    def supports_prefix(self, number: int, length: int) -> bool:
        return True

    @property
    def greedy_is_mode(self) -> bool:
        return True

    def greedy(self, num_values: int, length: int, context: Tensor | None = None) -> Tensor:
        # One argmax of the table, and not one for every event.
        return self._group_logits().argmax(dim=-1)[self.groups[:length]].expand(num_values, -1)

    def decode(
        self,
        decide: Decide,
        num_values: int,
        length: int,
        context: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
    ) -> Tensor:
        logits = self._group_logits()
        known = 0 if prefix is None else prefix.shape[1]
        dimensions = torch.arange(known, length, device=logits.device)
        rows = logits[self.groups[known:length]].expand(num_values, -1, -1)
        x = decide(dimensions, rows)
        return x if prefix is None else torch.cat([prefix, x], dim=1)

    @torch.no_grad()
    def init_from_counts(self, counts: Tensor) -> None:
        marginal = ((counts + 1) / (counts + 1).sum(dim=-1, keepdim=True)).to(self.logits)
        if marginal.ndim == 2:  # of every dimension: a group's is the mean of its dimensions'
            size = self.groups.bincount().unsqueeze(-1)
            marginal = torch.zeros_like(self.logits).index_add(0, self.groups, marginal) / size
        there = torch.ones_like(self.logits)
        if self.absent is not None:
            there = there.masked_fill(self.absent, 0)
        others = (there.sum(dim=-1, keepdim=True) - 1).clamp(min=1)
        peaked = (1 - PEAK) / others.repeat(1, self.num_classes)
        peaked[:, 0] = PEAK
        self.logits.copy_(torch.where(self.peaked.unsqueeze(-1), peaked, marginal).log())

    def count(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        cells = self.groups[: x.shape[1]] * self.num_classes + x
        weights = None if weight is None else weight.double().flatten()
        counts = cells.flatten().bincount(weights, minlength=self.logits.numel())
        return counts.double().reshape(self.logits.shape)

    @torch.no_grad()
    def refit(self, counts: Tensor, smoothing: float = 0.5) -> None:
        """Fits the distribution to counts, in closed form.

        Args:
            counts: Counts (G, K), sums of :meth:`count`.
            smoothing: Added to every count, so that no class has probability 0. Groups without
                counts keep their distribution.

        Example:
            >>> base = FactorizedBase(num_classes=3, length=2)
            >>> base.refit(base.count(torch.tensor([[0, 1], [1, 1]])), smoothing=1.0)
            >>> base.logits.softmax(-1)
            tensor([[0.2857, 0.5714, 0.1429]], grad_fn=<SoftmaxBackward0>)
        """
        totals = counts.sum(dim=-1, keepdim=True)
        probs = (counts + smoothing) / (totals + smoothing * self.num_classes)
        self.logits.copy_(torch.where(totals > 0, probs.log().to(self.logits), self.logits))
