"""The categorical distribution: draws by its inverse CDF, and the log-probability of a value.

One uniform number a value is all the randomness that a draw takes, so that samples do not depend on
the order in which they are made.
"""

import math

import torch
from torch import Tensor

from dflows.representations import is_one_hot

__all__ = ["cdf", "inverse_cdf", "search_cdf", "select_log_prob"]


def inverse_cdf(
    noise: Tensor,
    *,
    logits: Tensor | None = None,
    probs: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Draws classes by the inverse of the cumulative distribution function.

    It is computed in the most precise of float32, the noise's type and that of the logits or
    probabilities. A class of probability 0 is never drawn, whatever the noise.

    Args:
        noise: Numbers (…) from 0 to below 1.
        logits: Logits (…, K), or
        probs: Probabilities (…, K), which need not sum to 1. The batch dimensions of either are the
            last dimensions of the noise; draws along the others share a distribution.
        temperature: Divides the logits, or the logarithms of the probabilities.

    Returns:
        Indices (…), one for every number.

    Raises:
        ValueError: Unless one of logits and probabilities is given.

    Example:
        >>> noise = torch.tensor([0.0, 0.3, 0.6, 0.9])
        >>> inverse_cdf(noise, probs=torch.tensor([0.0, 0.5, 0.0, 0.5]))
        tensor([1, 1, 3, 3])
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 9.0], [9.0, 0.0], [0.0, 0.0]])
        >>> inverse_cdf(noise, logits=logits)
        tensor([0, 1, 0, 1])
    """
    given = probs if logits is None else logits
    if given is None or (logits is not None and probs is not None):
        raise ValueError("give either logits or probs")
    given = given.to(
        torch.promote_types(noise.dtype, torch.promote_types(given.dtype, torch.float))
    )
    if logits is None and temperature != 1:
        given = given.log()
    if logits is not None or temperature != 1:
        given = (given if temperature == 1 else given / temperature).softmax(dim=-1)
    return search_cdf(cdf(given), noise)


def cdf(probs: Tensor) -> Tensor:
    """Tabulates the cumulative distribution function, for many draws: :func:`search_cdf`.

    Args:
        probs: Probabilities (…, K), which need not sum to 1.

    Returns:
        Cumulative sums (…, K) that never fall, not even by rounding, and rise only at classes of
        some probability.
    """
    cumulative = probs.cumsum(dim=-1)
    if cumulative.device.type == "cpu":
        return cumulative  # summed one after the other
    return _never_falling(cumulative, probs)


def _never_falling(cumulative: Tensor, probs: Tensor) -> Tensor:
    """Mends the sums of a parallel scan, which may round neighbours in different ways."""
    return cumulative.masked_fill(probs == 0, 0).cummax(dim=-1).values


def search_cdf(cumulative: Tensor, noise: Tensor) -> Tensor:
    """Draws classes from a tabulated cumulative distribution function, by bisection.

    Args:
        cumulative: What :func:`cdf` returned, ``(*batch, K)``.
        noise: Numbers ``(*draws, *batch)`` from 0 to below 1.

    Returns:
        Indices ``(*draws, *batch)``.

    Example:
        >>> search_cdf(cdf(torch.tensor([1.0, 0.0, 3.0])), torch.tensor([0.2, 0.25, 0.9]))
        tensor([0, 2, 2])
    """
    # Below the total even after rounding, so that a class is always found.
    threshold = noise * cumulative[..., -1]
    cumulative = cumulative.to(threshold.dtype).contiguous()
    batch = cumulative.shape[:-1]
    if not batch:
        return torch.searchsorted(cumulative, threshold.contiguous(), right=True)
    if threshold.shape == batch:  # one draw a distribution
        one = threshold.contiguous().unsqueeze(-1)
        return torch.searchsorted(cumulative, one, right=True).squeeze(-1)
    # Rows of draws (*batch, n), one row a distribution.
    rows = threshold.reshape(-1, *batch).movedim(0, -1).contiguous()
    found = torch.searchsorted(cumulative, rows, right=True)
    return found.movedim(-1, 0).reshape(threshold.shape)


def select_log_prob(log_probs: Tensor, x: Tensor) -> Tensor:
    """Selects the log-probabilities of values.

    Args:
        log_probs: Log-probabilities (…, K).
        x: Indices (…) or one-hot vectors (…, K). A class of probability 0 adds nothing to a vector
            that is 0 there, whose gradient is the logarithm of the smallest number.

    Returns:
        Log-probabilities (…).

    Example:
        >>> log_probs = torch.tensor([0.25, 0.75, 0.0]).log()
        >>> select_log_prob(log_probs.expand(2, -1), torch.eye(3)[[1, 2]])
        tensor([-0.2877,    -inf])
    """
    if is_one_hot(x):
        lowest = math.log(torch.finfo(log_probs.dtype).tiny)
        impossible = (x == 0) & (log_probs == -torch.inf)
        return (x * log_probs.masked_fill(impossible, lowest)).sum(dim=-1)
    return log_probs.gather(-1, x.unsqueeze(-1)).squeeze(-1)
