"""The expert that adds what n-grams know to a network's logits."""

from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dflows.drafting import Drafter
from dflows.experts import Expert
from dflows.ngrams.chain import drafter
from dflows.ngrams.cross_fitting import CrossFit
from dflows.ngrams.messages import MOST_CLASSES, RightContext, look_up
from dflows.ngrams.model import NGrams
from dflows.remembered import Remembered

__all__ = ["NGramExpert"]

FEW = 256
"""Dimensions up to which joined tables are quicker, as level by level in generation."""


class NGramExpert(Expert):
    r"""Creates an expert that predicts by counted n-grams.

    Its first term is the log-probability of a class after the values of lower levels that stand
    right before the dimension, as many as the order uses. Its second, under orderings that know
    values behind a dimension too and for at most 64 classes, is the log-likelihood of these, by
    trigrams (:func:`dflows.ngrams.messages.right_context_messages`). By Bayes' theorem their sum is
    the log-probability given both sides, up to a constant.

    The n-grams are :attr:`ngrams`: call ``expert.ngrams.count(chunks)`` before training. Until then
    all classes are equally likely. If ``expert.cross_fit.count(chunks)`` was called as well,
    examples that were counted are scored by the n-grams of the other half of the text
    (:class:`~dflows.ngrams.cross_fitting.CrossFit`), and not by all but their own.

    Args:
        num_classes: K.
        order: n, as in :class:`dflows.ngrams.NGrams`.
        discount: Likewise.

    Raises:
        UserError: If a number is out of range.

    Example:
        >>> expert = NGramExpert(num_classes=2, order=2)
        >>> expert.ngrams.count([torch.tensor([0, 1, 0, 1, 1, 0, 1])])
        >>> levels = torch.tensor([0, 1, 0, 1])
        >>> expert.num_terms(levels)
        2
        >>> terms = expert(torch.tensor([[0, 0, 1, 0]]), levels, num_terms=2)
        >>> terms.shape
        torch.Size([1, 4, 2, 2])
        >>> terms[0, 1].sum(dim=-1).softmax(dim=-1)  # after 0 and before 1
        tensor([0.3125, 0.6875], dtype=torch.float64)
    """

    def __init__(self, num_classes: int, order: int, discount: float | None = None) -> None:
        super().__init__(num_classes)
        self.ngrams = NGrams(num_classes, order, discount)
        self.cross_fit = CrossFit(num_classes, order, discount)
        self._neighbours = Remembered(partial(_Neighbours.of, most=order - 1))

    def drafter(self, noise: Tensor, temperature: float = 1.0) -> Drafter:
        return drafter(self.ngrams, noise, temperature)

    def num_terms(self, levels: Tensor) -> int:
        both_sides = self.num_classes <= MOST_CLASSES and RightContext.of(levels).any
        return 2 if both_sides else 1

    @torch.no_grad()
    def forward(
        self, y: Tensor, levels: Tensor, dimensions: Tensor | None = None, *, num_terms: int
    ) -> Tensor:
        leave_out = self.leaves_one_out
        parts = self.cross_fit.of_others(y) if leave_out else []
        if not parts:
            return self._terms(self.ngrams, y, levels, dimensions, num_terms, leave_out)
        # The example of every row of the result, which a mask (N, d) does not keep apart.
        mask = dimensions if dimensions is not None and dimensions.dtype == torch.bool else None
        owners = torch.arange(len(y), device=y.device) if mask is None else mask.nonzero()[:, 0]
        terms, places = [], []
        for rows, ngrams in parts:
            chosen = dimensions if mask is None else mask[rows]
            terms.append(self._terms(ngrams, y[rows], levels, chosen, num_terms, leave_out=False))
            places.append(torch.isin(owners, rows).nonzero().squeeze(-1))
        return torch.cat(terms)[torch.cat(places).argsort()]

    def _terms(
        self,
        ngrams: NGrams,
        y: Tensor,
        levels: Tensor,
        dimensions: Tensor | None,
        num_terms: int,
        leave_out: bool,
    ) -> Tensor:
        known = self._neighbours(levels)
        some = dimensions is not None and dimensions.dtype != torch.bool
        parts = [known.runs.expand_as(y), y]
        if not some:
            parts.insert(0, ngrams.pack(y))
        if num_terms > 1:
            second = y[:, known.second].masked_fill(~known.has_second, self.num_classes)
            parts += [known.gap.expand_as(y), y[:, known.first], second, y.roll(1, dims=1)]
            if leave_out:
                paths = self._trigram_paths(y)
                parts += [path[:, known.end] - path for path in paths]
        if some:
            parts = [ngrams.pack(y, dimensions), *(part[:, dimensions] for part in parts)]
        elif dimensions is not None:
            parts = [part[dimensions] for part in parts]
        history, seen, own, *right = (part.flatten() for part in parts)
        if leave_out or len(history) > FEW:
            probs = ngrams.next_probs(history, seen, own if leave_out else None)
        else:
            probs = ngrams.lookup().next_probs(history, seen)
        terms = [probs.log()]
        if right:
            gap, first, second, before, *paths = right
            left_out = (own, paths[0], paths[1]) if paths else None
            likelihood = look_up(ngrams.messages(), gap, first, second, before, left_out)
            terms.append(likelihood.to(terms[0].dtype))
        return torch.stack(terms, dim=-1).unflatten(0, parts[0].shape)

    def _trigram_paths(self, y: Tensor) -> list[Tensor]:
        """Computes log-likelihoods (N, d) up to dimensions, with their own counts and without."""
        history, seen = self.ngrams.pack(y).flatten(), torch.arange(y.shape[1], device=y.device)
        seen = seen.clamp(max=2).expand_as(y).flatten()
        classes = y.flatten()
        paths = []
        for leave_out in (None, classes):
            probs = self.ngrams.next_probs(history, seen, leave_out)
            path = probs.gather(-1, classes.unsqueeze(-1)).log()
            paths.append(path.reshape(y.shape).cumsum(1))
        return paths


class _Neighbours(NamedTuple):
    """Which neighbours of dimensions (d,) are of lower levels.

    `runs` counts those right before a dimension, as far as n-grams use them. The right context is
    `gap` unknown dimensions away, begins at `first` and ends at `end`: the dimension behind,
    `second`, where that is known too.
    """

    runs: Tensor
    gap: Tensor
    first: Tensor
    second: Tensor
    has_second: Tensor
    end: Tensor

    @classmethod
    def of(cls, levels: Tensor, most: int) -> Self:
        """Finds the neighbours from levels, at most so many before; all at once for a device."""
        device, levels = levels.device, levels.cpu()
        last = len(levels) - 1
        gap, has_second = RightContext.of(levels)
        first = (torch.arange(len(levels)) + gap + 1).clamp(max=last)
        second = (first + 1).clamp(max=last)
        end = (first + has_second).clamp(max=last)
        parts = (_runs(levels, most), gap, first, second, has_second, end)
        return cls(*(part.to(device) for part in parts))


def _runs(levels: Tensor, most: int) -> Tensor:
    """Counts the dimensions (d,) right before each that are all of lower levels, up to so many."""
    runs, lower = torch.zeros_like(levels), torch.ones_like(levels, dtype=torch.bool)
    for back in range(1, min(most + 1, len(levels))):
        lower = lower & (levels.roll(back) < levels)
        lower[:back] = False
        runs += lower
    return runs
