"""Exact measures of distributions and flows whose states can all be enumerated.

A distribution over D dimensions of K classes is a table, float64 (K,) * D, that holds the
probability of every state. All measures are in nats.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dflows.errors import NonFiniteError, UserError
from dflows.exact.contexts import each_context_once
from dflows.flow import DiscreteFlow
from dflows.modules import device_of, evaluating

__all__ = [
    "MOST_STATES",
    "check_enumerable",
    "check_probabilities",
    "cross_entropy",
    "divergence",
    "entropy",
    "expected_loss",
    "factorized_entropy",
    "marginals",
    "probabilities",
    "share_of_gap",
    "states",
]

MOST_STATES = 50_000_000
"""The largest number of states that are enumerated: a table of 400 MB."""

BLOCK_SIZE = 65_536


def check_enumerable(num_classes: int, length: int) -> None:
    """Refuses an event whose states cannot be enumerated.

    Args:
        num_classes: K.
        length: D.

    Raises:
        UserError: If K is below 2, D below 1, or :math:`K^D` above `MOST_STATES`.
    """
    if num_classes < 2:
        raise UserError(
            f"num_classes is {num_classes}: give at least 2, one class leaves nothing to model"
        )
    if length < 1:
        raise UserError(f"length is {length}: give at least 1 dimension")
    # Of two classes so many are too many; the whole power of a mistyped length would take minutes.
    if num_classes ** min(length, MOST_STATES.bit_length()) > MOST_STATES:
        raise UserError(
            f"num_classes={num_classes} and length={length} have more than {MOST_STATES:,} states, "
            "too many to enumerate: lower length or num_classes"
        )


def check_alike(flow: DiscreteFlow) -> None:
    """Refuses a flow whose dimensions have different numbers of classes.

    Raises:
        UserError: If they have: tables here have the shape (K,) * D.
    """
    if flow.classes.each is not None:
        raise UserError(
            f"the dimensions of the flow have {flow.classes} classes, and a table is of one number "
            "for all: sum over flow.classes.states() by flow.log_prob"
        )


def check_probabilities(probabilities: Tensor) -> Tensor:
    """Refuses what is no table of probabilities.

    Args:
        probabilities: The probability of every state, (K,) * D.

    Returns:
        The table in float64.

    Raises:
        UserError: If the shape is another, there are too many states, or the values are negative,
            not finite, or do not sum to 1.
    """
    shape = tuple(probabilities.shape)
    if not shape or len(set(shape)) != 1:
        raise UserError(
            f"a table of probabilities has shape {shape}: give (K,) * D, a dimension of K classes "
            "for each of the D variables"
        )
    check_enumerable(shape[0], len(shape))
    table = probabilities.double()
    total = float(table.sum())
    if not abs(total - 1) < 1e-6 or table.min() < 0:
        raise UserError(
            f"the probabilities sum to {total:.6f}, the smallest is {float(table.min()):.6f}: give "
            "numbers that are not negative, and divide them by their sum"
        )
    return table


def states(num_classes: int, length: int, first: int = 0, last: int | None = None) -> Tensor:
    """Enumerates states in the order of their digits, the last dimension running first.

    Args:
        num_classes: K.
        length: D.
        first: Number of the first state.
        last: Number of the state to stop before; all states by default.

    Returns:
        Indices (last - first, D).

    Raises:
        UserError: If there are too many states to enumerate, or K is below 2.

    Example:
        >>> states(num_classes=3, length=2, first=4, last=7)
        tensor([[1, 1],
                [1, 2],
                [2, 0]])
    """
    check_enumerable(num_classes, length)
    count = num_classes**length
    last = count if last is None else min(last, count)
    powers = num_classes ** torch.arange(length - 1, -1, -1)
    return torch.arange(first, last).unsqueeze(-1) // powers % num_classes


def marginals(probabilities: Tensor) -> Tensor:
    """Computes the probability of each class in each dimension.

    Args:
        probabilities: The probability of every state, (K,) * D.

    Returns:
        Probabilities (D, K), float64.

    Raises:
        UserError: If `probabilities` is no table of probabilities.

    Example:
        >>> marginals(torch.tensor([[0.5, 0.25], [0.0, 0.25]]))
        tensor([[0.7500, 0.2500],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    return _marginals(check_probabilities(probabilities))


def _marginals(table: Tensor) -> Tensor:
    num_classes = table.shape[0]
    return torch.stack(
        [
            table.reshape(num_classes**dimension, num_classes, -1).sum(dim=(0, 2))
            for dimension in range(table.ndim)
        ]
    )


def entropy(probabilities: Tensor) -> float:
    """Computes the entropy: no model has a smaller expected loss.

    Args:
        probabilities: The probability of every state, (K,) * D.

    Returns:
        The entropy in nats.

    Raises:
        UserError: If `probabilities` is no table of probabilities.

    Example:
        >>> round(entropy(torch.full((2, 2), 0.25)), 4)  # ln 4
        1.3863
    """
    return _entropy(check_probabilities(probabilities))


def factorized_entropy(probabilities: Tensor) -> float:
    """Computes the expected loss of the best model with independent dimensions.

    Args:
        probabilities: The probability of every state, (K,) * D.

    Returns:
        The sum of the entropies of the dimensions, in nats.

    Raises:
        UserError: If `probabilities` is no table of probabilities.

    Example:
        >>> round(factorized_entropy(torch.eye(2) / 2), 4)  # where the entropy is ln 2
        1.3863
    """
    return _entropy(marginals(probabilities))


def _entropy(table: Tensor) -> float:
    return float(torch.special.entr(table).sum())


def _log_probs(
    module: nn.Module,
    log_prob: Callable[[Tensor], Tensor],
    num_classes: int,
    length: int,
    block_size: int,
    table: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores all states, or those that have a probability in a table, block by block.

    Yields:
        The numbers (n,) of the states and their log-probabilities (n,), float64, on the CPU.
    """
    if block_size < 1:
        raise UserError(f"block_size is {block_size}: give at least 1 state")
    device, count = device_of(module), num_classes**length
    with evaluating(module), each_context_once():
        for first in range(0, count, block_size):
            last = min(first + block_size, count)
            numbers, block = torch.arange(first, last), slice(first, last)
            y = states(num_classes, length, first, last)
            if table is not None:
                kept = table[block] > 0
                numbers, y = numbers[kept], y[kept]
            if len(y):
                yield numbers, _checked(log_prob(y.to(device)).cpu().double(), module)


def _checked(log_probs: Tensor, module: nn.Module) -> Tensor:
    wrong = ~(log_probs < torch.inf)
    if wrong.any():
        raise NonFiniteError(
            f"{type(module).__name__} gives {int(wrong.sum())} of {len(log_probs)} states a "
            f"log-probability of {float(log_probs[wrong][0])}: it has most likely diverged, so "
            "lower the learning rate, or clip gradients"
        )
    return log_probs


def probabilities(flow: DiscreteFlow, block_size: int = BLOCK_SIZE) -> Tensor:
    """Computes the probability that a flow gives to every state.

    Args:
        flow: A flow without a context.
        block_size: States that are scored at once.

    Returns:
        A table (K,) * D, float64.

    Raises:
        UserError: If there are too many states to enumerate.

    Example:
        >>> from dflows import FactorizedBase
        >>> flow = DiscreteFlow(FactorizedBase(num_classes=3, length=4, sharing="positions"))
        >>> table = probabilities(flow)
        >>> table.shape, round(table.sum().item(), 5)
        (torch.Size([3, 3, 3, 3]), 1.0)
    """
    check_alike(flow)
    check_enumerable(flow.num_classes, flow.length)
    size = flow.num_classes, flow.length
    blocks = _log_probs(flow, flow.log_prob, *size, block_size)
    log_probs = torch.cat([log_prob for _, log_prob in blocks])
    return log_probs.exp().reshape((flow.num_classes,) * flow.length)


def expected_loss(
    module: nn.Module,
    log_prob: Callable[[Tensor], Tensor],
    probabilities: Tensor,
    block_size: int = BLOCK_SIZE,
) -> float:
    r"""Computes the expected loss :math:`-\sum_y p(y) \log q(y)` of any model, exactly.

    States of no probability are not scored. The model is evaluated in its own precision and in
    evaluation mode, and summed up in float64.

    Args:
        module: The model.
        log_prob: Takes indices (n, D) on its device and returns log-probabilities (n,).
        probabilities: The probability of every state, (K,) * D.
        block_size: States that are scored at once.

    Returns:
        The expected loss in nats; infinite if the model gives none to a state that has one.

    Raises:
        UserError: If `probabilities` is no table of probabilities.
        NonFiniteError: If a log-probability is NaN, or infinite and positive.

    Example:
        >>> from torch import nn
        >>> quarter = torch.tensor(0.25).log()
        >>> table = torch.tensor([[0.5, 0.25], [0.0, 0.25]])
        >>> round(expected_loss(nn.Identity(), lambda y: quarter.expand(len(y)), table), 4)  # ln 4
        1.3863
    """
    return _expected_loss(module, log_prob, check_probabilities(probabilities), block_size)


def _expected_loss(
    module: nn.Module, log_prob: Callable[[Tensor], Tensor], table: Tensor, block_size: int
) -> float:
    flat = table.cpu().flatten()
    blocks = _log_probs(module, log_prob, table.shape[0], table.ndim, block_size, flat)
    return -sum(float(flat[numbers] @ log_prob) for numbers, log_prob in blocks)


def cross_entropy(flow: DiscreteFlow, probabilities: Tensor, block_size: int = BLOCK_SIZE) -> float:
    """Computes the expected loss of a flow, exactly: :func:`expected_loss` of its likelihood.

    Args:
        flow: A flow without a context.
        probabilities: The probability of every state, (K,) * D.
        block_size: States that are scored at once.

    Returns:
        The cross-entropy in nats; infinite if the flow gives none to a state that has one.

    Raises:
        UserError: If `probabilities` is no table of probabilities, or one of another flow.

    Example:
        >>> from dflows import FactorizedBase
        >>> flow = DiscreteFlow(FactorizedBase(num_classes=2, length=2))
        >>> round(cross_entropy(flow, torch.tensor([[0.5, 0.25], [0.0, 0.25]])), 4)  # ln 4
        1.3863
    """
    table = check_probabilities(probabilities)
    check_alike(flow)
    expected = (flow.num_classes,) * flow.length
    if table.shape != expected:
        raise UserError(
            f"a table of probabilities {tuple(table.shape)} was given to a flow of "
            f"num_classes={flow.num_classes} and length={flow.length}: give {expected}"
        )
    return _expected_loss(flow, flow.log_prob, table, block_size)


def divergence(flow: DiscreteFlow, probabilities: Tensor, block_size: int = BLOCK_SIZE) -> float:
    """Computes the Kullback–Leibler divergence of a flow from a distribution, exactly.

    Arguments and errors are those of :func:`cross_entropy`.

    Returns:
        The cross-entropy less the entropy, in nats.
    """
    return cross_entropy(flow, probabilities, block_size) - entropy(probabilities)


def share_of_gap(cross_entropy: float, entropy: float, factorized_entropy: float) -> float:
    """Computes how much of the way from the best factorized model to the truth a model goes.

    Args:
        cross_entropy: The model's expected loss.
        entropy: The entropy of the distribution.
        factorized_entropy: The expected loss of the best model with independent dimensions.

    Returns:
        0 for the best factorized model, 1 for the distribution itself; negative for a worse model.

    Raises:
        UserError: If there is no gap: the dimensions are independent.

    Example:
        >>> round(share_of_gap(cross_entropy=7.632, entropy=7.62, factorized_entropy=8.044), 3)
        0.972
    """
    gap = factorized_entropy - entropy
    if not gap > 1e-12:
        raise UserError(
            f"the factorized entropy is {factorized_entropy:.6f} and the entropy {entropy:.6f}: "
            "independent dimensions leave no gap of which a flow could close a share"
        )
    return (factorized_entropy - cross_entropy) / gap
