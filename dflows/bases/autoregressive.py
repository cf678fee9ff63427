"""The autoregressive base over an ordering."""

import torch
from torch import Generator, Tensor

from dflows.bases.base import Base
from dflows.categorical import inverse_cdf, select_log_prob
from dflows.conditioner import Conditioner
from dflows.decoding import Decide, decide_levels, solve_fixed_point
from dflows.errors import UserError
from dflows.orderings import Ordering
from dflows.representations import check_logits, is_one_hot
from dflows.views import view

__all__ = ["AutoregressiveBase", "check_start"]


def check_start(ordering: Ordering, length: int) -> None:
    """Refuses an ordering in which nothing comes first.

    Raises:
        UserError: If no dimension has level 0.
    """
    if int(ordering.levels(length).min()):
        raise UserError(
            f"{ordering!r} has no dimension of level 0, where a base starts: give it the ordering "
            "inside"
        )


class AutoregressiveBase(Base):
    r"""Creates a base in which every dimension depends on those of lower levels.

    .. math:: p(x) = \prod_d p(x_d \mid x_e : \ell_e < \ell_d)

    Over the natural ordering and without transforms this is a language model; over a strided one,
    the dimensions of a level are sampled in parallel. Over an ordering of one level,
    ``Strided(1)``, the dimensions are independent given a context.

    Args:
        conditioner: The network over its ordering; its logits are those of the K classes.

    Raises:
        UserError: If the conditioner has other logits, or no dimension of level 0.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from dflows.backbones import LSTM
        >>> from dflows.orderings import Natural
        >>> base = AutoregressiveBase(Conditioner(3, 4, Natural(), LSTM(width=8)))
        >>> base.passes
        4
        >>> states = torch.cartesian_prod(*[torch.arange(3)] * 4)
        >>> round(base.log_prob(states).sum(-1).exp().sum().item(), 5)
        1.0
    """

    scores_parts = False

    def __init__(self, conditioner: Conditioner) -> None:
        super().__init__(conditioner.classes.given, conditioner.length)
        if conditioner.num_logits != conditioner.num_classes:
            raise UserError(
                f"a base reads the logits of {conditioner.num_classes} classes, and the "
                f"conditioner has {conditioner.num_logits}: leave out its num_logits"
            )
        if conditioner.classes.each is not None and conditioner.absent is None:
            raise UserError(
                "a base reads the logits of classes, and the conditioner was given num_logits: "
                "leave it out"
            )
        check_start(conditioner.ordering, conditioner.length)
        self.conditioner = conditioner

    @property
    def ordering(self) -> Ordering:
        return self.conditioner.ordering

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        return self.conditioner.takes_context

    @property
    def passes(self) -> int:
        return self.conditioner.num_levels

    def with_passes(self, passes: int) -> "AutoregressiveBase":
        return view(self, conditioner=self.conditioner.resized(num_levels=passes))

    def with_length(self, length: int) -> "AutoregressiveBase":
        conditioner = self.conditioner.resized(length)
        return view(self, conditioner=conditioner, length=length, classes=conditioner.classes)

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

        Raises:
            NonFiniteError: If logits are not finite.
        """
        return select_log_prob(check_logits(logits, "AutoregressiveBase").log_softmax(dim=-1), x)

    def sampled_log_prob(
        self, x: Tensor, context: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        if self.conditioner.one_pass or is_one_hot(x):
            return super().sampled_log_prob(x, context, weight)
        num_levels = len(self.conditioner.layout(x.shape[1], x.device).members)
        level = torch.randint(num_levels, x.shape[:1], device=x.device)
        sampled, logits = self.conditioner.sampled_level_logits(x, level, context)
        score = num_levels * self.score(logits, x[sampled])
        if weight is not None:
            score = score * weight[sampled]
        return score.new_zeros(x.shape[0]).index_add(0, sampled.nonzero()[:, 0], score)

    def noise(self, num_samples: int, length: int, generator: Generator | None = None) -> Tensor:
        device = self.conditioner.head.weight.device
        shape = (num_samples, length)
        return torch.rand(shape, dtype=torch.float, device=device, generator=generator)

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
        def decide(dimensions: Tensor, logits: Tensor) -> Tensor:
            return inverse_cdf(noise[:, dimensions], logits=logits, temperature=temperature)

        number, length = noise.shape
        if not fixed_point:
            return self.decode(decide, number, length, context, prefix=prefix), self.passes
        x, known = self._begin(number, length, prefix)
        drafts = self.conditioner.expert if draft is None else draft
        return solve_fixed_point(
            self.conditioner,
            x,
            self._checked(decide),
            context,
            prefix_length=known,
            drafter=None if drafts is None else drafts.drafter(noise, temperature),
        )

    def supports_prefix(self, number: int, length: int) -> bool:
        return self.conditioner.supports_prefix(number, length)

    @property
    def greedy_is_mode(self) -> bool:
        return self.passes == 1

    def decode(
        self,
        decide: Decide,
        num_values: int,
        length: int,
        context: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
    ) -> Tensor:
        x, known = self._begin(num_values, length, prefix)
        return decide_levels(
            self.conditioner, x, self._checked(decide), context, prefix_length=known
        )

    def conditionals(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if not self.conditioner.one_pass:
            return super().conditionals(x, context)
        return check_logits(self.conditioner(x, context), type(self).__name__).log_softmax(dim=-1)

    def _begin(self, num_values: int, length: int, prefix: Tensor | None) -> tuple[Tensor, int]:
        """Returns values to decide (N, d), and how many of the first are decided."""
        device = self.conditioner.head.weight.device
        x = torch.zeros(num_values, length, dtype=torch.long, device=device)
        if prefix is None:
            return x, 0
        known = prefix.shape[1]
        x[:, :known] = prefix
        return x, known

    def _checked(self, decide: Decide) -> Decide:
        return lambda dimensions, logits: decide(
            dimensions, check_logits(logits, type(self).__name__)
        )

    @torch.no_grad()
    def init_from_counts(self, counts: Tensor) -> None:
        # The first likelihoods are those of the marginal, or else those of the expert.
        total = counts if counts.ndim == 1 or self.classes.each else counts.sum(dim=0)
        marginal = (total + 1) / (total + 1).sum(dim=-1, keepdim=True)
        known = self.conditioner.expert is not None
        self.conditioner.init_head(torch.zeros_like(marginal) if known else marginal.log())
