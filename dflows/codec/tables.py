"""Probabilities as integers, which an entropy coder takes as they are.

A range coder adds and multiplies integers. The frequencies of a distribution are integers that sum
to 2²⁴, at least 1 each, so that every class can be coded; the two directions agree as long as they
compute the same logits.
"""

from collections.abc import Iterator
from typing import Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflows.errors import NonFiniteError

__all__ = [
    "MOST_CLASSES",
    "ComputedOtherwise",
    "Decoder",
    "Encoder",
    "frequencies",
    "parts_of",
    "uniform",
]

PRECISION = 24
"""Bits of a frequency: that of constriction's models."""

MOST_CLASSES = 1 << 20
"""Classes that still have probabilities worth the name."""

AT_ONCE = 1 << 20
"""Frequencies that are computed together."""

# Probabilities that are integers and sum to 2²⁴ - K are taken over exactly, each with 1 added.
_FAMILY = constriction.stream.model.Categorical(perfect=False)
Words = NDArray[np.uint32]


def frequencies(logits: Tensor) -> Tensor:
    """Computes the frequencies of classes.

    Args:
        logits: Logits (…, K); a class of probability 0 gets the smallest frequency.

    Returns:
        Integers (…, K) of at least 1 that sum to 2²⁴, on the CPU. The mean code length of a value
        exceeds the entropy by less than K · 2⁻²² bits, and none exceeds 24 bits.

    Raises:
        NonFiniteError: If logits are not numbers, or all of a distribution are -∞.

    Example:
        >>> frequencies(torch.tensor([0.25, 0.75, 0.0]).log())
        tensor([ 4194304, 12582911,        1])
    """
    probs = logits.cpu().double().softmax(dim=-1)
    if bool(probs.isnan().any()):
        raise NonFiniteError("a distribution has no finite logits: the model has diverged")
    free = (1 << PRECISION) - probs.shape[-1]
    counts = (probs * free).long()
    # What is lost by rounding goes to the likeliest class.
    lost = free - counts.sum(dim=-1, keepdim=True)
    return counts.scatter_add(-1, probs.argmax(dim=-1, keepdim=True), lost) + 1


def parts_of(logits: Tensor) -> Iterator[Tensor]:
    """Yields logits (…, K) in parts (m, K) of about a million numbers, in order.

    What is expanded to its shape never takes the memory of it.
    """
    num_classes = logits.shape[-1]
    logits = logits if logits.ndim > 1 else logits.unsqueeze(0)
    a_row = max(1, logits.shape[1:].numel())
    for rows in logits.split(max(1, AT_ONCE // a_row)):
        yield from rows.reshape(-1, num_classes).split(max(1, AT_ONCE // num_classes))


def _tables(logits: Tensor) -> Iterator[NDArray[np.float32]]:
    """Yields tables (m, K) of some of the distributions, as constriction takes them."""
    for part in parts_of(logits):
        yield (frequencies(part) - 1).numpy().astype(np.float32)


class ComputedOtherwise(Exception):  # noqa: N818 - who catches it says what differs
    """The logits of the decoder are not those of the encoder."""


class Encoder:
    """Creates an encoder of values, whose distributions come level by level.

    Example:
        >>> logits = torch.zeros(2, 3, 4)
        >>> encoder = Encoder()
        >>> encoder.encode(torch.tensor([[0, 3, 1], [2, 2, 0]]), logits)
        >>> payload = encoder.payload()
        >>> len(payload), Decoder(payload).decode(logits)
        (4, tensor([[0, 3, 1],
                [2, 2, 0]]))
    """

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def encode(self, values: Tensor, logits: Tensor) -> None:
        """Encodes values (…), given the logits (…, K) of their distributions."""
        symbols = values.flatten().cpu().numpy().astype(np.int32)
        begin = 0
        for table in _tables(logits):
            self._coder.encode(symbols[begin : begin + len(table)], _FAMILY, table)
            begin += len(table)

    def payload(self) -> bytes:
        """Returns what was encoded."""
        words: Words = self._coder.get_compressed()
        return words.astype("<u4").tobytes()


class Decoder:
    """Creates a decoder of what an :class:`Encoder` has encoded, in the same order.

    Args:
        payload: What it returned.
    """

    def __init__(self, payload: bytes) -> None:
        words = np.frombuffer(payload, "<u4", len(payload) // 4).astype(np.uint32)
        self._coder = constriction.stream.queue.RangeDecoder(words)

    def decode(self, logits: Tensor) -> Tensor:
        """Decodes values (…), given the logits (…, K) of their distributions.

        Raises:
            ComputedOtherwise: If no values have been encoded with such logits.
        """
        found: list[NDArray[Any]] = []
        try:
            found.extend(self._coder.decode(_FAMILY, table) for table in _tables(logits))
        except AssertionError:  # what constriction raises
            raise ComputedOtherwise from None
        values = np.concatenate(found) if found else np.zeros(0, np.int32)
        return torch.from_numpy(values).long().reshape(logits.shape[:-1]).to(logits.device)


def uniform(num_events: int, length: int, num_classes: int) -> Tensor:
    """Returns the logits (N, d, K) of values of which nothing is known."""
    return torch.zeros(1, 1, 1).expand(num_events, length, num_classes)
