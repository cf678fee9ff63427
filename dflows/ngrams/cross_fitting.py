"""Cross-fitting: n-grams that predict a training text from the rest of it alone."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dflows.counted import Counted
from dflows.ngrams.kneser_ney import find
from dflows.ngrams.model import NGrams

__all__ = ["CrossFit"]

PART = 1 << 19
"""Classes of a part, which parts of the other half come before and after."""


class CrossFit(Counted):
    """Creates n-grams of the two halves of a text, each of which predicts the other.

    A text repeats itself nearby. Its own n-grams predict it better than they predict other text,
    even if each value is left out of the counts, and a network that learns beside them trusts them
    too much. N-grams of the other half are as good as on other text.

    The halves are parts of the text in turn. They are not saved: whoever goes on with a training
    counts again. A text of a single part has no halves.

    Args:
        num_classes: K.
        order: n, as in :class:`dflows.ngrams.NGrams`.
        discount: Likewise.

    References:
        | Double/debiased machine learning (Chernozhukov et al., 2018), for cross-fitting
        | https://arxiv.org/abs/1608.00060
    """

    def __init__(self, num_classes: int, order: int, discount: float | None = None) -> None:
        super().__init__()
        self._options = (num_classes, order, discount)
        self._others: list[NGrams] = []  # no modules: their tables enter no checkpoint
        self._num_counted = 0

    def extra_repr(self) -> str:
        return ", ".join(f"ngrams={len(ngrams.keys)}" for ngrams in self._others)

    @property
    def num_counted(self) -> int:
        return self._num_counted

    def count(self, chunks: Iterable[Any]) -> None:
        halves: list[list[Tensor]] = [[], []]
        done = 0
        for chunk in chunks:
            values = torch.as_tensor(chunk)
            # Consecutive pieces are cut where a part ends; events stay whole.
            pieces = [values]
            if values.ndim == 1:
                first = PART - done % PART
                pieces = [values[:first], *values[first:].split(PART)]
            for piece in pieces:
                halves[done // PART % 2].append(piece)
                done += piece.numel()
        self._num_counted = done
        self._others = []
        if all(sum(map(len, half)) for half in halves):
            for half in reversed(halves):
                ngrams = NGrams(*self._options)
                ngrams.count(half)
                self._others.append(ngrams)

    def of_others(self, y: Tensor) -> list[tuple[Tensor, NGrams]]:
        """Finds the n-grams that were counted without the examples.

        The half of an example is the one that has its longest n-grams.

        Args:
            y: Indices (N, d) of examples that were counted.

        Returns:
            For each half the examples (n,) in it, and the n-grams of the other; nothing where there
            are no halves.
        """
        if not self._others:
            return []
        found = []
        for ngrams in self._others:
            ngrams.to(y.device)
            *_, (m, windows) = ngrams.packing.ngrams(y)
            keys = ngrams.tables[m - 1].keys
            found.append((find(keys, windows) < len(keys)).sum(dim=1))
        half = torch.stack(found).argmin(dim=0)
        return [((half == n).nonzero().squeeze(-1), other) for n, other in enumerate(self._others)]
