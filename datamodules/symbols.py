"""The symbols of texts, as classes and as bytes: what an archive of any file needs."""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["NO_ESCAPES", "ByteSymbols", "CharacterSymbols"]

READ = 1 << 16

Codes = NDArray[np.uint32]
Escapes = tuple[NDArray[np.int64], Codes]

NO_ESCAPES: Escapes = (np.zeros(0, np.int64), np.zeros(0, np.uint32))
"""What a text has whose symbols all have classes."""


def _digest(*described: object) -> bytes:
    return hashlib.sha256(json.dumps(described).encode()).digest()[:8]


class ByteSymbols:
    """Creates the symbols of a :class:`~datamodules.vocabulary.ByteVocabulary`.

    Example:
        >>> symbols = ByteSymbols()
        >>> symbols.to_bytes(symbols.join(*symbols.split(np.array([104, 105]))))
        b'hi'
    """

    name = "bytes"
    digest = _digest("bytes")

    def cut(self, source: BinaryIO, size: int) -> Iterator[Codes]:
        """Yields the bytes of a text, so many at once."""
        while part := source.read(size):
            while len(part) < size and (more := source.read(size - len(part))):
                part += more  # a pipe gives what it has
            yield np.frombuffer(part, np.uint8).astype(np.uint32)

    def split(self, codes: Codes) -> tuple[NDArray[np.integer], Escapes]:
        """Returns bytes as classes; there are no escapes."""
        return codes, NO_ESCAPES

    def join(self, classes: NDArray[np.int64], escapes: Escapes) -> Codes:
        """Returns the bytes of what :meth:`split` returned.

        Raises:
            ValueError: If it cannot have returned this.
        """
        if len(escapes[0]):
            raise ValueError("all bytes have classes")
        return classes.astype(np.uint32)

    def to_bytes(self, codes: Codes) -> bytes:
        """Returns a part of the text."""
        return codes.astype(np.uint8).tobytes()


class CharacterSymbols:
    """Creates the symbols of a :class:`~datamodules.vocabulary.CharacterVocabulary`.

    A text is read as UTF-8. A byte b of it that is none is the code 0xDC00 + b, as Python has it
    (``surrogateescape``), so that all bytes come back.

    Args:
        symbols: The characters in the order of their classes.
        unknown: The class of all others, where there is one.
        look_up: Returns the classes of code points; -1 for those that have none.

    Example:
        >>> from datamodules.vocabulary import CharacterVocabulary
        >>> symbols = CharacterVocabulary("abc").text_symbols()
        >>> classes, (places, codes) = symbols.split(np.array([97, 120, 99]))
        >>> classes, places, codes
        (array([0, 2]), array([1]), array([120], dtype=uint32))
        >>> symbols.to_bytes(symbols.join(classes, (places, codes)))
        b'axc'
    """

    name = "characters"

    def __init__(
        self,
        symbols: Sequence[str],
        unknown: int | None,
        look_up: Callable[[Codes], NDArray[np.integer]],
    ) -> None:
        self.digest = _digest([*symbols], unknown)
        self._codes = np.array([ord(symbol) for symbol in symbols], np.uint32)
        self._unknown = unknown
        self._look_up = look_up

    def cut(self, source: BinaryIO, size: int) -> Iterator[Codes]:
        """Yields the code points of a text, so many at once."""
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        waiting, final = "", False
        while not final:
            part = source.read(READ)
            final = not part
            waiting += decoder.decode(part, final)
            while len(waiting) >= size or (final and waiting):
                raw = waiting[:size].encode("utf-32-le", "surrogatepass")
                waiting = waiting[size:]
                yield np.frombuffer(raw, "<u4").astype(np.uint32)

    def split(self, codes: Codes) -> tuple[NDArray[np.integer], Escapes]:
        """Returns the classes of code points, and those that have none of their own.

        These are one class where there is such a class, and are left out elsewhere.
        """
        classes = self._look_up(codes)
        known = (classes >= 0) & (self._codes[classes] == codes)
        escaped = np.flatnonzero(~known)
        kept = classes[known] if self._unknown is None else classes
        return kept, (escaped, codes[escaped].astype(np.uint32))

    def join(self, classes: NDArray[np.int64], escapes: Escapes) -> Codes:
        """Returns the code points of what :meth:`split` returned.

        Raises:
            ValueError: If it cannot have returned this.
        """
        places, codes = escapes
        own = self._codes[classes]
        length = len(own) + (len(places) if self._unknown is None else 0)
        if len(places) and places[-1] >= length:
            raise ValueError("an escape lies outside of the text")
        if self._unknown is not None:
            own[places] = codes
            return own
        whole, rest = np.empty(length, np.uint32), np.ones(length, np.bool_)
        rest[places] = False
        whole[places], whole[rest] = codes, own
        return whole

    def to_bytes(self, codes: Codes) -> bytes:
        """Returns a part of the text.

        Raises:
            ValueError: If a code is no code point, or half a surrogate pair.
        """
        text = codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
        return text.encode("utf-8", "surrogateescape")
