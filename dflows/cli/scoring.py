"""The bits of every character of a text, and what the model held likelier."""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.vocabulary import Vocabulary
from dflows.bases import Base
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.modules import device_of
from dflows.orderings import Ordering
from dflows.representations import exactly
from dflows.transforms import DiscreteTransform

__all__ = ["Likelier", "Line", "Place", "Scored", "score"]

AT_ONCE = 1 << 22
"""Probabilities that are computed together."""

MOST_LIKELIER = 5
SYMBOLS_AT_ONCE = 1 << 20

Bits = NDArray[np.float64]


class Likelier(NamedTuple):
    """What a model held likelier than what stands in a text, one entry after the other.

    Args:
        counts: The number of entries of each character (n,).
        classes: The classes (m,), the likeliest of a character first.
        probs: Their probabilities (m,).
    """

    counts: NDArray[np.int64]
    classes: NDArray[np.int64]
    probs: Bits


class Line(NamedTuple):
    """A line of a text, its end included.

    Args:
        number: Its number, from 1.
        begin: Its first character in the text.
        end: The one behind its last.
        bits: Its bits.
        scored: Its characters that the model has classes for.
    """

    number: int
    begin: int
    end: int
    bits: float
    scored: int

    @property
    def bits_per_character(self) -> float:
        """Its bits per character."""
        return self.bits / max(self.scored, 1)

    @property
    def perplexity(self) -> float:
        """The perplexity of a character."""
        return _perplexity(self.bits_per_character)


def _perplexity(bits: float) -> float:
    return 2**bits if bits < 1000 else math.inf


@dataclass(frozen=True)
class Place:
    """Creates a place in a text.

    Args:
        index: Its place in the text.
        line: The number of its line.
        column: Its number in the line, from 1.
        bits: Its bits.
    """

    index: int
    line: int
    column: int
    bits: float


@dataclass(frozen=True)
class Scored:
    """Creates the score of a text.

    Args:
        text: The text. A byte that is no UTF-8 is half a surrogate pair.
        bits: The bits of each character; NaN where the model has no class for it.
        vocabulary: What the classes of `likelier` stand for.
        passes: Passes of the model.
        drawn: In which pass each character is drawn, from 1; 0 before the first, -1 where it has no
            class. None without a single ordering.
        likelier: What the model held likelier; None under transforms, where it does not say so.
    """

    text: str
    bits: Bits
    vocabulary: Vocabulary
    passes: int = 0
    drawn: NDArray[np.int64] | None = None
    likelier: Likelier | None = None

    @property
    def total(self) -> float:
        """All bits."""
        return float(np.nansum(self.bits))

    @property
    def scored(self) -> int:
        """The characters that the model has classes for."""
        return int((~np.isnan(self.bits)).sum())

    @property
    def bits_per_character(self) -> float:
        """Bits per character of those."""
        return self.total / max(self.scored, 1)

    @property
    def perplexity(self) -> float:
        """The perplexity of a character."""
        return _perplexity(self.bits_per_character)

    @property
    def exact_terms(self) -> bool:
        """Whether the bits of a character are its own, given those of lower levels.

        Otherwise they are those of what the transforms leave at its place.
        """
        return self.likelier is not None

    def surprising_lines(self, number: int) -> list[Line]:
        """Returns the lines of most bits a character, the worst first."""
        scored = [line for line in self.lines() if line.scored]
        return sorted(scored, key=lambda line: -line.bits_per_character)[:number]

    def lines(self) -> list[Line]:
        """Returns the lines, each of which ends behind a newline."""
        ends = [place + 1 for place, sign in enumerate(self.text) if sign == "\n"]
        if not ends or ends[-1] < len(self.text):
            ends.append(len(self.text))
        begins = [0, *ends[:-1]]
        return [
            Line(
                number,
                begin,
                end,
                float(np.nansum(self.bits[begin:end])),
                int((~np.isnan(self.bits[begin:end])).sum()),
            )
            for number, (begin, end) in enumerate(zip(begins, ends, strict=True), 1)
            if end > begin
        ]

    def places(self, number: int) -> list[Place]:
        """Returns the most surprising characters, the worst first."""
        order = np.argsort(-np.nan_to_num(self.bits, nan=-math.inf), kind="stable")[:number]
        found = []
        for index in map(int, order):
            if np.isnan(self.bits[index]):
                break
            line = self.text.count("\n", 0, index) + 1
            column = index - self.text.rfind("\n", 0, index)
            found.append(Place(index, line, column, float(self.bits[index])))
        return found

    def likelier_at(self, index: int) -> list[tuple[str, float]]:
        """Returns the symbols that were likelier than a character, and their probabilities."""
        if self.likelier is None:
            return []
        counts, classes, probs = self.likelier
        begin = int(counts[:index].sum())
        entries = slice(begin, begin + int(counts[index]))
        return [
            (self.vocabulary.decode([symbol]), float(prob))
            for symbol, prob in zip(classes[entries], probs[entries], strict=True)
        ]


def score(
    flow: DiscreteFlow, vocabulary: Vocabulary, content: bytes, *, overlap: int = 0
) -> Scored:
    """Scores a text in windows.

    Args:
        flow: The flow, in evaluation mode.
        vocabulary: What its classes stand for.
        content: The text, in UTF-8.
        overlap: Characters of each window that are known from the window before, and not scored
            again.

    Raises:
        UserError: If the flow is conditional, or its first dimensions depend on later ones and
            windows overlap.
    """
    symbols = vocabulary.text_symbols()
    if flow.takes_context:
        raise UserError("the model is conditional, and a text has no context to give it")
    _check_overlap(flow, overlap)
    codes = np.concatenate(
        [np.zeros(0, np.uint32), *symbols.cut(io.BytesIO(content), SYMBOLS_AT_ONCE)]
    )
    classes, (escaped, _) = symbols.split(codes)
    kept = np.ones(len(codes), np.bool_)
    if len(classes) < len(codes):
        kept[escaped] = False
    own = _score(flow, torch.from_numpy(classes.astype(np.int64)), overlap)
    bits = np.full(len(codes), math.nan)
    bits[kept] = own.bits
    drawn, likelier = None, own.likelier
    if own.drawn is not None:
        drawn = np.full(len(codes), -1, np.int64)
        drawn[kept] = own.drawn
    if likelier is not None:
        counts = np.zeros(len(codes), np.int64)
        counts[kept] = likelier.counts
        likelier = likelier._replace(counts=counts)
    text = symbols.to_bytes(codes).decode("utf-8", "surrogateescape")
    if len(text) != len(codes):
        bits, drawn, likelier = _by_character(text, bits, drawn, likelier)
    return Scored(text, bits, vocabulary, flow.passes, drawn, likelier)


def _check_overlap(flow: DiscreteFlow, overlap: int) -> None:
    if not 0 <= overlap < flow.length:
        raise UserError(f"overlap is {overlap}: give 0 to below {flow.length}, a window")
    for part in _parts(flow):
        if overlap and not part.supports_prefix(overlap, flow.length):
            raise UserError(
                f"overlap is {overlap}, and in {type(part).__name__} over {part.ordering!r} the "
                "first characters of a window depend on later ones: leave overlap away"
            )


class _Own(NamedTuple):
    """The score of classes."""

    bits: Bits
    drawn: NDArray[np.int64] | None
    likelier: Likelier | None


def _score(flow: DiscreteFlow, classes: Tensor, overlap: int) -> _Own:
    bits, drawn, counts, likelier, probs = [], [], [], [], []
    ordering = _ordering(flow)
    # The first level of a transform takes no pass, and that of a base does.
    first = 0 if len(flow.transforms) else 1
    for known, rows in _windows(classes, flow.num_classes, flow.length, overlap):
        y = rows.to(device_of(flow))
        terms, found = _terms(flow, y, known)
        bits.append(terms)
        if ordering is not None:
            passes = ordering.levels(rows.shape[1])[known:].numpy() + first
            drawn.append(np.tile(passes, len(rows)))
        if found is not None:
            counts.append(found.counts)
            likelier.append(found.classes)
            probs.append(found.probs)
    return _Own(
        _joined(bits, np.float64),
        None if ordering is None else _joined(drawn, np.int64),
        Likelier(_joined(counts, np.int64), _joined(likelier, np.int64), _joined(probs, np.float64))
        if not len(flow.transforms)
        else None,
    )


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)


def _parts(flow: DiscreteFlow) -> list[Base | DiscreteTransform]:
    return [flow.base, *flow.transforms]


def _ordering(flow: DiscreteFlow) -> Ordering | None:
    """Returns the one ordering of a flow, if it has one."""
    found = [part.ordering for part in _parts(flow) if part.ordering is not None]
    return found[0] if len(found) == 1 else None


def _windows(
    classes: Tensor, num_classes: int, length: int, overlap: int
) -> Iterator[tuple[int, Tensor]]:
    """Yields windows (N, d), and how many of their first symbols are known."""
    at_once = max(1, AT_ONCE // (length * num_classes))
    if overlap and len(classes) > length:
        yield 0, classes[:length].unsqueeze(0)
        classes = classes[length - overlap :]
    else:
        overlap = 0
    step = length - overlap
    number = max(0, (len(classes) - overlap) // step)
    for first in range(0, number, at_once):
        starts = range(first * step, min(first + at_once, number) * step, step)
        yield overlap, torch.stack([classes[start : start + length] for start in starts])
    rest = classes[number * step :]
    if len(rest) > overlap:
        yield overlap, rest.unsqueeze(0)


@torch.no_grad()
def _terms(flow: DiscreteFlow, y: Tensor, known: int) -> tuple[Bits, Likelier | None]:
    """Returns the bits of the symbols behind the known ones, and what was likelier."""
    if len(flow.transforms):
        terms = flow.log_prob_terms(y)[:, known:].cpu().double()
        return -terms.flatten().numpy() / math.log(2), None
    with exactly(y.device):
        table = flow.base.conditionals(y)[:, known:].flatten(0, 1).cpu().double()
    own = table.gather(1, y[:, known:].reshape(-1, 1).cpu())
    values, classes = table.topk(min(MOST_LIKELIER, table.shape[1]), dim=1)
    above = values > own
    likelier = Likelier(
        above.sum(dim=1).numpy(),
        classes[above].numpy(),
        values[above].exp().numpy(),
    )
    return -own.flatten().numpy() / math.log(2), likelier


def _by_character(
    text: str,
    bits: Bits,
    drawn: NDArray[np.int64] | None,
    likelier: Likelier | None,
) -> tuple[Bits, NDArray[np.int64] | None, Likelier | None]:
    """Returns the scores of characters, given those of their bytes."""
    sizes = np.array([len(sign.encode("utf-8", "surrogateescape")) for sign in text])
    begins = sizes.cumsum() - sizes
    if likelier is not None:
        # What else could begin a character of several bytes is no character.
        single = np.repeat(sizes == 1, np.add.reduceat(likelier.counts, begins))
        counts = np.where(sizes == 1, likelier.counts[begins], 0)
        likelier = Likelier(counts, likelier.classes[single], likelier.probs[single])
    return (
        np.add.reduceat(bits, begins),
        None if drawn is None else drawn[begins],
        likelier,
    )
