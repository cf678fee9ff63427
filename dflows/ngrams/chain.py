"""Values decided by n-grams, one dimension after the other."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dflows.categorical import inverse_cdf
from dflows.drafting import Drafter
from dflows.ngrams.model import NGrams

__all__ = ["decide_left_to_right", "drafter", "draw_left_to_right"]


def decide_left_to_right(
    ngrams: NGrams, values: Tensor, places: Tensor, decide: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Decides values from left to right, each given all before it, in n look-ups for all rows.

    Args:
        ngrams: The n-grams.
        values: Indices (N, d).
        places: The dimensions to decide of every row (N, n), in order, d for none; others stay.
        decide: From one dimension of every row (N,) and the probabilities (N, K) of its classes, to
            indices (N,).

    Returns:
        Indices (N, d).
    """
    reach = ngrams.order - 1
    # Zeros before the first dimension are never read; a row that is done writes behind the last.
    text = F.pad(values, (reach, 1))
    offsets = torch.arange(reach, device=values.device)
    shifts = ngrams.bits * offsets.flip(0)
    lookup = ngrams.lookup()
    for place in places.unbind(1):
        before = text.gather(1, place.unsqueeze(-1) + offsets)
        probs = lookup.next_probs((before << shifts).sum(dim=1), place)
        text.scatter_(1, place.unsqueeze(-1) + reach, decide(place, probs).unsqueeze(-1))
    return text[:, reach:-1]


def draw_left_to_right(
    ngrams: NGrams, values: Tensor, places: Tensor, noise: Tensor, temperature: float = 1.0
) -> Tensor:
    """Draws values as :func:`decide_left_to_right` decides them.

    Args:
        ngrams: The n-grams.
        values: Indices (N, d).
        places: The dimensions to draw of every row (N, n), in order, d for none.
        noise: Numbers (N, d) from 0 to below 1.
        temperature: Divides the logarithms of the probabilities.

    Returns:
        Indices (N, d).
    """
    padded = F.pad(noise, (0, 1))

    def decide(place: Tensor, probs: Tensor) -> Tensor:
        own = padded.gather(1, place.unsqueeze(-1)).squeeze(-1)
        return inverse_cdf(own, probs=probs, temperature=temperature)

    return decide_left_to_right(ngrams, values, places, decide)


def drafter(ngrams: NGrams, noise: Tensor, temperature: float = 1.0) -> Drafter:
    """Returns what draws the values that are to be guessed from left to right.

    A dimension takes the class that its noise gives under the n-grams. A network that reads the
    same noise takes the same one wherever its distribution is alike.

    Args:
        ngrams: The n-grams.
        noise: Numbers (N, d) from 0 to below 1.
        temperature: Divides the logarithms of the probabilities.

    Example:
        >>> ngrams = NGrams(num_classes=2, order=2, discount=0.01)
        >>> ngrams.count([torch.tensor([0, 1, 0, 1, 0, 1, 0])])
        >>> draft = drafter(ngrams, torch.full((1, 6), 0.5))
        >>> draft(torch.ones(1, 6, dtype=torch.long), torch.arange(6).unsqueeze(0) > 0)
        tensor([[1, 0, 1, 0, 1, 0]])
    """

    def draft(values: Tensor, due: Tensor) -> Tensor:
        return draw_left_to_right(ngrams, values, _places(due), noise, temperature)

    return draft


def _places(due: Tensor) -> Tensor:
    """Returns the true dimensions of every row of a mask (N, d), in order, and d where fewer."""
    counts = due.sum(dim=1, keepdim=True)
    steps = torch.arange(int(counts.max()) if len(due) else 0, device=due.device)
    places = due.int().argsort(dim=1, descending=True, stable=True)[:, : len(steps)]
    return places.masked_fill(steps >= counts, due.shape[1])
