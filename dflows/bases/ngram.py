"""The n-gram base: interpolated Kneser–Ney over the natural order of positions."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Generator, Tensor

from dflows.bases.base import Base
from dflows.classes import NumClasses, numbers_of
from dflows.decoding import Decide
from dflows.drafting import Drafter
from dflows.errors import UserError
from dflows.ngrams import NGrams, decide_left_to_right, drafter, draw_left_to_right
from dflows.representations import to_indices

__all__ = ["NGramBase"]


class NGramBase(Base):
    """Creates a base of n-grams, counted and not trained.

    Every dimension depends on the n - 1 before it, with interpolated Kneser–Ney smoothing
    (:class:`dflows.ngrams.NGrams`). The same n-grams serve at all positions.

    An event may start anywhere in a text. Its dimension i < n - 1 has seen i others, so a model of
    order i + 1 predicts it, from the counts of (i + 1)-grams: every dimension has a distribution
    given those before it, and the probabilities of events of any length sum to 1.

    It has no parameters, and sampling takes no network evaluation: a dimension is one table look-up
    an order, in float64. It gives the transforms on it no gradient, so they need losses of their
    own (:class:`dflows.objectives.Local`). Before :meth:`count` it is uniform.

    Args:
        num_classes: K.
        length: D.
        order: n, as in :class:`dflows.ngrams.NGrams`.
        discount: Likewise.

    Raises:
        UserError: If a number is out of range.

    Example:
        >>> base = NGramBase(num_classes=3, length=4, order=2, discount=0.5)
        >>> base.count([torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1, 2])])
        >>> x = torch.tensor([[0, 1, 0, 1]])
        >>> base.log_prob(x).exp()
        tensor([[0.4286, 0.8889, 0.6111, 0.8889]], dtype=torch.float64)
        >>> states = torch.cartesian_prod(*[torch.arange(3)] * 4)
        >>> round(base.log_prob(states).sum(-1).exp().sum().item(), 5)
        1.0
    """

    scores_parts = False
    differentiable = False
    takes_context = False

    def __init__(
        self, num_classes: NumClasses, length: int, *, order: int = 6, discount: float | None = None
    ) -> None:
        number = numbers_of(num_classes)
        if not isinstance(number, int):
            raise UserError(
                "an NGramBase counts the same classes in all dimensions, and num_classes has a "
                "number for each: choose a FactorizedBase or an AutoregressiveBase"
            )
        super().__init__(number, length)
        self.ngrams = NGrams(number, order, discount)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, length={self.length}"

    @property
    def passes(self) -> int:
        return 0

    @property
    def num_counted(self) -> int:
        """The classes that were counted; none before :meth:`count`."""
        return self.ngrams.num_counted

    def count(self, chunks: Iterable[Any]) -> None:
        """Counts data in one pass, as :meth:`dflows.ngrams.NGrams.count`."""
        self.ngrams.count(chunks)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.ngrams.log_prob(to_indices(x))

    def noise(self, num_samples: int, length: int, generator: Generator | None = None) -> Tensor:
        shape = (length, num_samples)
        device = self.ngrams.keys.device
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
        values, places = self._begin(len(noise), noise.shape[1], prefix)
        return draw_left_to_right(self.ngrams, values, places, noise, temperature), 0

    def drafter(self, noise: Tensor, temperature: float = 1.0) -> Drafter:
        return drafter(self.ngrams, noise, temperature)

    def supports_prefix(self, number: int, length: int) -> bool:
        return True

    @property
    def greedy_is_mode(self) -> bool:
        return self.ngrams.order == 1

    def decode(
        self,
        decide: Decide,
        num_values: int,
        length: int,
        context: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
    ) -> Tensor:
        values, places = self._begin(num_values, length, prefix)

        def decide_one(place: Tensor, probs: Tensor) -> Tensor:
            return decide(place[:1], probs.log().unsqueeze(1)).squeeze(1)

        return decide_left_to_right(self.ngrams, values, places, decide_one)

    def _begin(self, num_values: int, length: int, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns values to decide (N, d), and the dimensions (N, n) that are not decided yet."""
        places = torch.arange(length, device=self.ngrams.keys.device).repeat(num_values, 1)
        values = torch.zeros_like(places)
        if prefix is None:
            return values, places
        known = prefix.shape[1]
        values[:, :known] = prefix
        return values, places[:, known:]

    def init_from_counts(self, counts: Tensor) -> None:
        """Does nothing: :meth:`count` finds the whole distribution."""
