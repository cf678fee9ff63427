"""The estimator that trains flows in turn, first each by itself and then on all that is beneath."""

from torch import Tensor

from dflows.bijections import Bijection
from dflows.errors import UserError
from dflows.estimators.estimator import check_positive
from dflows.estimators.local import LocalInTurn

__all__ = ["JointInTurn"]


class JointInTurn(LocalInTurn):
    r"""Creates the local objective in turn, and after it a policy gradient in turn.

    In the first round of turns every flow learns by itself, as with
    :class:`~dflows.estimators.LocalInTurn`. That leaves what only shows further down: which x a
    flow should hand to the flows beneath it. So in further rounds a flow learns from the likelihood
    of the whole stack. Of each dimension in turn, all others as they are, that of every class is
    evaluated, exactly; the map of the dimension is drawn several times from a policy, and the
    policy made to prefer those whose x was likelier than the mean of the others',

    .. math::

        \nabla \approx \frac{1}{S - 1} \sum_s (R_{x_s} - \bar R)\, \nabla \log \pi(b_s), \qquad
        R_x = \log q(\ldots, x_{d-1}, x, x_{d+1}, \ldots).

    A policy is the softmax of the logits over the temperature, and for rank permutations the order
    of choices without replacement by it (Plackett and Luce). A step takes D·K evaluations an
    example of all that is beneath: it is for few dimensions of few classes, and asks for many
    examples of every context.

    Arguments:
        steps: Optimizer steps of one turn; equal parts of the training where they are not given.
        rounds: Rounds of joint turns, after that of local ones.
        temperature: That of the policy. The higher, the more is tried, and the more is lost of
            differences between logits that are smaller.
        draws: S, maps that are drawn of every dimension, at least 2.

    Raises:
        UserError: If a number is out of range.

    References:
        | Local Expectation Gradients for Black Box Variational Inference (Titsias &
          Lázaro-Gredilla, 2015)
        | https://arxiv.org/abs/1503.01494
        | Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool et al., 2019)

    Example:
        >>> estimator = JointInTurn(steps=100)
        >>> estimator.rounds
        2
    """

    def __init__(
        self,
        steps: int | None = None,
        rounds: int = 1,
        temperature: float = 0.1,
        draws: int = 8,
    ) -> None:
        super().__init__(steps)
        if rounds < 1:
            raise UserError(f"rounds is {rounds}: give at least 1, or LocalInTurn has none")
        if draws < 2:
            raise UserError(f"draws is {draws}: give at least 2, whose mean is to compare with")
        self.rounds = 1 + rounds
        self.temperature = check_positive(temperature)
        self.draws = draws

    def extra_repr(self) -> str:
        return (
            f"steps={self.steps}, rounds={self.rounds - 1}, temperature={self.temperature}, "
            f"draws={self.draws}"
        )

    def check(self, bijection: Bijection) -> None:
        if not bijection.categorical and type(bijection).draw_inverse is Bijection.draw_inverse:
            raise UserError(
                f"JointInTurn draws maps, and a {type(bijection).__name__} has none to draw: give "
                "LocalInTurn, or a bijection that has a draw_inverse of its own"
            )

    def policy(self, bijection: Bijection, y: Tensor, logits: Tensor, values: Tensor) -> Tensor:
        """Computes zeros with the policy's gradient.

        Args:
            bijection: The map of one dimension.
            y: Indices (N, n).
            logits: Logits (N, n, num_logits).
            values: Log-likelihoods (N, n, K) of all that is beneath, for every x of a dimension.

        Returns:
            Zeros (N,).
        """
        x, log_policy = bijection.draw_inverse(y, logits, self.draws, self.temperature)
        rewards = values.expand(self.draws, *values.shape).gather(-1, x.unsqueeze(-1)).squeeze(-1)
        better = (rewards - rewards.mean(dim=0)) / (self.draws - 1)
        total = (better.to(log_policy.dtype) * log_policy).sum(dim=(0, -1))
        return total - total.detach()
