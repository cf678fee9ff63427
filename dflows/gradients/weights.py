r"""The weight :math:`c = \partial\text{loss}/\partial\log p` of every example, for rules that ask.

Back-propagation gives a rule the gradient of the loss. To recover the gradient of an example's
log-likelihood, the rule must divide by c, which combines means, accumulation, loss scaling and
averaging over ranks. So a zero for every example passes from rule to rule, and is finally added to
the log-likelihoods: its value never changes, but its gradient is c, and reaches every rule before
the rule computes its own gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from dflows.errors import UserError

__all__ = ["ExampleWeights", "current_weights", "example_weights"]


class ExampleWeights:
    """What one evaluation passes from rule to rule; created by :func:`example_weights`."""

    def __init__(self) -> None:
        self._zeros: Tensor | None = None

    def zeros(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns the zeros (N,) of the last rule, or new ones.

        Args:
            like: A tensor of the type and device that new ones have.
            shape: The batch shape of what the rule is given.

        Raises:
            UserError: If the last rule was given another number of examples.
        """
        if self._zeros is None:
            return like.new_zeros(shape)
        return self._of(like, shape)

    def _of(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        zeros = self._zeros
        assert zeros is not None  # noqa: S101
        expected = like.new_empty(()).expand(shape).numel()
        if zeros.numel() != expected:
            raise UserError(
                f"the gradient rules of one evaluation were given {zeros.numel()} and {expected} "
                "examples: the logits of every transform must be (N, n, M), N the same for all"
            )
        return zeros.to(like).reshape(shape)

    def hand_on(self, zeros: Tensor) -> None:
        """Stores the zeros of a rule."""
        self._zeros = zeros

    def __call__(self, log_prob: Tensor) -> Tensor:
        """Returns the log-likelihoods (…), whose gradient now reaches the rules."""
        if self._zeros is None:
            return log_prob
        return log_prob + self._of(log_prob, tuple(log_prob.shape))


_current: ContextVar[ExampleWeights | None] = ContextVar("example_weights", default=None)


def current_weights() -> ExampleWeights | None:
    """Returns the weights of the evaluation that is under way, if it has any."""
    return _current.get()


@contextmanager
def example_weights() -> Iterator[ExampleWeights]:
    """Hands the gradient of the log-likelihoods to the rules that are evaluated within.

    Example:
        >>> import torch
        >>> from dflows.gradients import PosteriorRule
        >>> rule, logits = PosteriorRule(), torch.zeros(2, 1, 2, requires_grad=True)
        >>> with example_weights() as weights:
        ...     log_prob = (rule(logits) * torch.tensor([0.8, 0.2]).log()).sum((-1, -2))
        ...     log_prob = weights(log_prob)
        >>> (-log_prob.mean()).backward()
        >>> logits.grad.squeeze()
        tensor([[-0.1500,  0.1500],
                [-0.1500,  0.1500]])
    """
    weights = ExampleWeights()
    token = _current.set(weights)
    try:
        yield weights
    finally:
        _current.reset(token)
