"""The categorical distribution: draws by its inverse CDF, and the log-probability of a value.

One uniform number a value is all the randomness that a draw takes, so that samples do not depend on
the order in which they are made.
"""

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
        probs: Probabilities (…, K), which need not sum to 1. Where either has fewer batch
            dimensions than the noise, all draws along the first dimensions of the noise share it
            and are searched for by bisection; otherwise the two broadcast.
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
    if noise.ndim >= given.ndim:
        return search_cdf(cdf(given), noise)
    cumulative = given.cumsum(dim=-1).masked_fill_(given == 0, 0)
    # Rounded, it stays below the maximum, which a class of some probability has.
    threshold = noise.unsqueeze(-1) * cumulative.amax(dim=-1, keepdim=True)
    return (cumulative > threshold).view(torch.uint8).argmax(dim=-1)


def cdf(probs: Tensor) -> Tensor:
    """Tabulates the cumulative distribution function, for many draws: :func:`search_cdf`.

    Args:
        probs: Probabilities (…, K), which need not sum to 1.

    Returns:
        Cumulative sums (…, K) that never fall, not even by rounding, and rise only at classes of
        some probability.
    """
    return probs.cumsum(dim=-1).masked_fill(probs == 0, 0).cummax(dim=-1).values


def search_cdf(cumulative: Tensor, noise: Tensor) -> Tensor:
    """Draws classes from a tabulated cumulative distribution function, by bisection.

    Args:
        cumulative: What :func:`cdf` returned, (*batch, K).
        noise: Numbers (*draws, *batch) from 0 to below 1.

    Returns:
        Indices (*draws, *batch).

    Example:
        >>> search_cdf(cdf(torch.tensor([1.0, 0.0, 3.0])), torch.tensor([0.2, 0.25, 0.9]))
        tensor([0, 2, 2])
    """
    noise = noise * cumulative[..., -1]
    batch = cumulative.ndim - 1
    if not batch:
        return torch.searchsorted(cumulative, noise.contiguous(), right=True)
    draws = noise.shape[: noise.ndim - batch]
    # (draws, *batch) to (*batch, draws): the layout of a search in sorted rows.
    rows = noise.flatten(0, noise.ndim - batch - 1) if draws else noise.unsqueeze(0)
    rows = rows.movedim(0, -1).to(cumulative.dtype).contiguous()
    found = torch.searchsorted(cumulative.contiguous(), rows, right=True)
    return found.movedim(-1, 0).reshape(noise.shape)


def select_log_prob(log_probs: Tensor, x: Tensor) -> Tensor:
    """Selects the log-probabilities of values.

    Args:
        log_probs: Log-probabilities (…, K).
        x: Indices (…) or one-hot vectors (…, K). A class of probability 0 adds nothing to a vector
            that is 0 there.

    Returns:
        Log-probabilities (…).

    Example:
        >>> log_probs = torch.tensor([0.25, 0.75, 0.0]).log()
        >>> select_log_prob(log_probs.expand(2, -1), torch.eye(3)[[1, 2]])
        tensor([-0.2877,    -inf])
    """
    if is_one_hot(x):
        return (x * log_probs.masked_fill((x == 0) & (log_probs == -torch.inf), 0)).sum(dim=-1)
    return log_probs.gather(-1, x.unsqueeze(-1)).squeeze(-1)
