"""The autoregressive base over an ordering."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from dflows.bases.base import Base
from dflows.conditioner import Conditioner, Execution
from dflows.errors import UserError
from dflows.ngrams import NGrams
from dflows.orderings import Natural, Ordering
from dflows.representations import is_one_hot

__all__ = ["AutoregressiveBase"]


class AutoregressiveBase(Base):
    r"""Creates a base in which every dimension depends on those of lower levels.

    .. math:: p(x) = \prod_d p(x_d \mid x_e : \ell_e < \ell_d)

    Over the natural ordering, with no flow on it, this is a language model; over a strided one its
    levels are drawn in parallel. Over an ordering of one level, ``Strided(1)``, its dimensions are
    independent given a context.

    Arguments:
        num_classes: K.
        length: D.
        orderings: Orderings of the flow's transforms; none of them matters here.
        backbone: The network, from features (N, D, width) to features (N, D, width).
        ordering: Which dimensions condition which; natural by default.
        draw: What one training step of a backbone that runs masked evaluates: ``all`` levels, or
            one ``level`` an example, an unbiased estimate in one evaluation.
        width: As in :class:`dflows.conditioner.Conditioner`, as are the rest.
        execution: How the backbone is run.
        positions: Whether a learned embedding of positions is added.
        context_features: Features of a context.
        align_context: Whether position d of the context belongs to dimension d.
        grams: N-grams of x that are added to the logits.

    Raises:
        UserError: If the parts do not fit each other.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from dflows.backbones import LSTM
        >>> base = AutoregressiveBase(num_classes=3, length=4, backbone=LSTM(width=8))
        >>> base.passes
        4
        >>> states = torch.cartesian_prod(*[torch.arange(3)] * 4)
        >>> round(base.log_prob(states).sum(-1).exp().sum().item(), 5)
        1.0
    """

    scores_parts = False

    def __init__(
        self,
        num_classes: int,
        length: int,
        orderings: Sequence[Ordering] = (),
        *,
        backbone: nn.Module,
        ordering: Ordering | None = None,
        draw: Literal["all", "level"] = "all",
        width: int | None = None,
        execution: Execution = "auto",
        positions: bool | None = None,
        context_features: int | None = None,
        align_context: bool = False,
        grams: NGrams | None = None,
    ) -> None:
        super().__init__(num_classes, length)
        if draw not in ("all", "level"):
            raise UserError(f"draw is {draw!r}: give 'all' or 'level'")
        self.draw = draw
        self.conditioner = Conditioner(
            num_classes,
            length,
            num_classes,
            ordering or Natural(),
            backbone,
            width=width,
            execution=execution,
            positions=positions,
            context_features=context_features,
            align_context=align_context,
            conditions_first=True,
            grams=grams,
        )

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        return self.conditioner.context is not None

    @property
    def passes(self) -> int:
        return self.conditioner.passes

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.score(self.conditioner(x, context), x)

    @staticmethod
    def score(logits: Tensor, x: Tensor) -> Tensor:
        """Computes the log-likelihood of every dimension from the network's logits, in nats.

        Args:
            logits: Logits (…, d, K).
            x: Indices (…, d) or one-hot vectors (…, d, K).

        Returns:
            Log-likelihoods (…, d).
        """
        log_probs = logits.log_softmax(dim=-1)
        if is_one_hot(x):
            return (x * log_probs).sum(dim=-1)
        return log_probs.gather(-1, x.unsqueeze(-1)).squeeze(-1)

    def objective(
        self, x: Tensor, context: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        if self.draw == "all" or self.conditioner.one_pass or is_one_hot(x):
            return super().objective(x, context, weight)
        _, members = self.conditioner.levels(x.shape[1], x.device)
        level = torch.randint(len(members), x.shape[:1], device=x.device)
        drawn, logits = self.conditioner.drawn_logits(x, level, context)
        score = len(members) * self.score(logits, x[drawn])
        if weight is not None:
            score = score * weight[drawn]
        return score.new_zeros(x.shape[0]).index_add(0, drawn.nonzero()[:, 0], score)

    def noise(self, num_samples: int, length: int, generator: Generator | None = None) -> Tensor:
        device = self.conditioner.head.weight.device
        return torch.rand(num_samples, length, device=device, generator=generator)

    def from_noise(
        self,
        noise: Tensor,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        fixed_point: bool = False,
        beginning: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        def decide(dimensions: Tensor, logits: Tensor) -> Tensor:
            # By the inverse of the distribution function: one number a dimension is all the
            # randomness there is, whatever the order of the evaluations.
            cumulative = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
            threshold = noise[:, dimensions].unsqueeze(-1) * cumulative[..., -1:]
            return (cumulative[..., :-1] <= threshold).sum(dim=-1)

        x = torch.zeros(noise.shape, dtype=torch.long, device=noise.device)
        known = 0
        if beginning is not None:
            known = beginning.shape[1]
            x[:, :known] = beginning
        if fixed_point:
            return self.conditioner.fixed_point(x, decide, context, known)
        return self.conditioner.by_levels(x, decide, context, known), self.passes

    def keeps_beginning(self, number: int, length: int) -> bool:
        return self.conditioner.keeps_beginning(number, length)

    @property
    def greedy_is_mode(self) -> bool:
        return self.passes == 1

    def greedy(self, num_values: int, length: int, context: Tensor | None = None) -> Tensor:
        def decide(_: Tensor, logits: Tensor) -> Tensor:
            return logits.argmax(dim=-1)

        device = self.conditioner.head.weight.device
        x = torch.zeros(num_values, length, dtype=torch.long, device=device)
        return self.conditioner.by_levels(x, decide, context)

    @torch.no_grad()
    def start(self, counts: Tensor) -> None:
        # The head's bias starts at the marginal, and its weights at 0, so that the first
        # likelihoods are those of the marginal; or at 0, and they are those of the n-grams.
        total = counts if counts.ndim == 1 else counts.sum(dim=0)
        marginal = (total + 1) / (total + 1).sum()
        self.conditioner.head.weight.zero_()
        bias = marginal.log() if self.conditioner.grams is None else torch.zeros_like(marginal)
        self.conditioner.head.bias.copy_(bias.to(self.conditioner.head.bias))
