"""The interface of all bijections: what is done to one K-class variable, given logits."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from dflows.errors import UserError
from dflows.representations import to_indices, to_one_hot

__all__ = ["INITIAL_MARGIN", "Bijection", "Choose"]

INITIAL_MARGIN = 0.1
"""Lead of the identity's logits at initialisation: no tie, and a softmax of any usual temperature
still spreads over all classes."""

Choose: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps logits (…, D, M) and log-determinants (…) to one-hot vectors (…, D, M) and log-determinants
(…), with the gradient of an estimator."""


def gumbel_like(logits: Tensor) -> Tensor:
    """Draws Gumbel noise: with it, the largest of logits is a draw from their softmax."""
    return -torch.empty_like(logits).exponential_().log()


class Bijection(nn.Module, ABC):
    """Creates a bijection of {0, …, K-1} whose parameters are read off logits.

    A bijection knows nothing of orderings, networks or estimators: it maps values (…, D), given
    logits (…, D, num_logits), one dimension at a time.

    Arguments:
        num_classes: K, at least 2.
        num_logits: Logits that choose the map of one dimension.

    Raises:
        UserError: If K is below 2.
    """

    categorical: ClassVar[bool]
    """Whether the map is chosen by categorical variables, as rules over a softmax require."""
    needs_target: ClassVar[bool]
    """Whether the local objective needs a distribution of x to aim at."""

    def __init__(self, num_classes: int, num_logits: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(
                f"num_classes is {num_classes}, and a bijection of fewer than 2 classes has "
                "nothing to transform: give at least 2"
            )
        self.num_classes = num_classes
        self.num_logits = num_logits

    @abstractmethod
    def initial_logits(self) -> Tensor:
        """Returns the logits (num_logits,) of the identity."""

    @abstractmethod
    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """Maps indices base → data, (…, D) given logits (…, D, num_logits)."""

    @abstractmethod
    def inverse(self, y: Tensor, logits: Tensor) -> Tensor:
        """Maps indices data → base, (…, D) given logits (…, D, num_logits)."""

    @abstractmethod
    def forward_through(
        self, x: Tensor, logits: Tensor, ladj: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        """Maps one-hot vectors base → data, with a gradient for `x` and the logits.

        Args:
            x: One-hot vectors (…, D, K).
            logits: Logits (…, D, num_logits).
            ladj: Log-determinants (…), zeros; see :mod:`dflows.estimators` for what they carry.
            choose: The estimator's way from logits to one-hot vectors.

        Returns:
            One-hot vectors (…, D, K) and log-determinants (…).
        """

    @abstractmethod
    def inverse_through(
        self, y: Tensor, logits: Tensor, ladj: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        """Maps one-hot vectors data → base; the inverse of :meth:`forward_through`."""

    @abstractmethod
    def local_log_likelihood(self, y: Tensor, logits: Tensor, target: Tensor | None) -> Tensor:
        """Computes what the local objective maximises, in nats.

        Args:
            y: Indices (…, D).
            logits: Logits (…, D, num_logits).
            target: Log-probabilities (K,) of the x to aim at, where `needs_target` says so.

        Returns:
            Log-likelihoods (…, D).
        """

    def draw_inverse(
        self, y: Tensor, logits: Tensor, draws: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Draws maps, and maps indices data → base by them.

        Args:
            y: Indices (…, D).
            logits: Logits (…, D, num_logits).
            draws: S, the maps that are drawn of every dimension.
            temperature: That of the softmax that maps are drawn from.

        Returns:
            Indices (S, …, D), and the log-probabilities (S, …, D) of the maps that were drawn.
        """
        chances: list[Tensor] = []

        def choose(part: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
            log_probs = (part / temperature).log_softmax(dim=-1)
            choice = (log_probs.detach() + gumbel_like(log_probs)).argmax(dim=-1)
            chances.append(log_probs.gather(-1, choice.unsqueeze(-1)).squeeze(-1))
            return to_one_hot(choice, part.shape[-1], part.dtype), ladj

        logits = logits.expand(draws, *logits.shape)
        values = to_one_hot(y, self.num_classes, logits.dtype).expand(draws, *y.shape, -1)
        x, _ = self.inverse_through(values, logits, logits.new_zeros(draws, *y.shape[:-1]), choose)
        return to_indices(x), torch.stack(chances).sum(dim=0)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}"
