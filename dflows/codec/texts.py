"""Texts as archives: streams of bytes, whatever is in them.

A text is cut into blocks, which are encoded and decoded one after the other in constant memory.
Characters that the model has no class for, and bytes that are no UTF-8, are escapes beside it.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dflows.codec.archive import ArchiveError, ArchiveReader, ArchiveWriter, Block, Content, Header
from dflows.codec.blocks import same_numbers
from dflows.codec.flows import (
    check_model,
    check_size,
    computed_otherwise,
    events_of,
    header_of,
    read,
    written,
)
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.modules import device_of

__all__ = ["Codes", "Escapes", "TextCodec", "TextSymbols", "Totals"]

Progress = Callable[[int], None]

Codes = NDArray[np.uint32]
"""Symbols of a text as numbers: code points, or bytes."""

Escapes = tuple[NDArray[np.int64], Codes]
"""Places in a part of a text, and the codes that stand there, which have no class."""

CONTENTS = {"characters": Content.CHARACTERS, "bytes": Content.BYTES}


class TextSymbols(Protocol):
    """What the classes of a model stand for: all texts are made of it, and of escapes."""

    @property
    def name(self) -> str:
        """The symbols in a word: characters or bytes."""

    @property
    def digest(self) -> bytes:
        """8 bytes that tell them from others."""

    def cut(self, source: BinaryIO, size: int) -> Iterator[Codes]:
        """Yields the codes of a text, so many at once."""

    def split(self, codes: Codes) -> tuple[NDArray[np.integer], Escapes]:
        """Returns the classes of codes, and what has none."""

    def join(self, classes: NDArray[np.int64], escapes: Escapes) -> Codes:
        """Returns the codes of what :meth:`split` returned.

        Raises:
            ValueError: If it cannot have returned this.
        """

    def to_bytes(self, codes: Codes) -> bytes:
        """Returns the part of the text that codes stand for.

        Raises:
            ValueError: If they stand for none.
        """


@dataclass
class Totals:
    """Creates the counts of an archive.

    Args:
        content: Bytes of the text.
        symbols: Characters of it, or bytes where those are the symbols.
        escaped: Symbols that the model has no class for.
        size: Bytes of the archive.
    """

    content: int = 0
    symbols: int = 0
    escaped: int = 0
    size: int = 0


class TextCodec:
    """Creates what encodes and decodes texts with a flow.

    Args:
        flow: The flow, over windows of a text.
        symbols: What its classes stand for: `vocabulary.text_symbols()`.

    Raises:
        UserError: If the flow takes a context.
    """

    def __init__(self, flow: DiscreteFlow, symbols: TextSymbols) -> None:
        if flow.takes_context:
            raise UserError(
                "the model is conditional, and a text has no context to give it: use "
                "dflows.codec.compress(flow, indices, context) in Python"
            )
        self.flow = flow
        self.symbols = symbols

    def compress(
        self,
        source: BinaryIO,
        target: BinaryIO,
        *,
        batch_size: int | None = None,
        threads: int | None = None,
        progress: Progress = lambda _: None,
    ) -> Totals:
        """Encodes a text.

        Args:
            source: The text.
            target: What the archive is written to.
            batch_size: Windows that are encoded together; so many that they have 65,536 symbols by
                default.
            threads: Threads of the CPU, for both directions; torch's by default.
            progress: Told how many bytes of the text are encoded.

        Raises:
            UserError: If a number is out of range.
        """
        flow, totals = self.flow, Totals()
        events, threads = check_size(flow, batch_size, threads)
        header = header_of(flow, CONTENTS[self.symbols.name], events, threads)
        writer = ArchiveWriter(target, replace(header, vocabulary=self.symbols.digest))
        with same_numbers(flow, threads):
            for codes in self.symbols.cut(source, header.block_size):
                classes, escapes = self.symbols.split(codes)
                content = self.symbols.to_bytes(codes)
                values = torch.from_numpy(classes.astype(np.int64)).to(device_of(flow))
                groups = events_of(values, flow.length)
                writer.write(
                    written(flow, groups, zlib.crc32(content), escapes=_packed(escapes)), content
                )
                totals.content += len(content)
                totals.symbols += len(codes)
                totals.escaped += len(escapes[0])
                progress(totals.content)
        writer.close()
        totals.size = writer.size
        return totals

    def decompress(
        self, archive: ArchiveReader, progress: Progress = lambda _: None
    ) -> Iterator[bytes]:
        """Decodes a text, and yields it block by block, each when it is checked.

        Args:
            archive: The archive. :meth:`ArchiveReader.check` checks all of it before.
            progress: Told how many bytes of the text are decoded.

        Raises:
            ArchiveError: If it holds no text, is damaged, or was written by another model, or where
                this one computes other numbers.
        """
        self.check(archive.header, archive.name)
        check_model(self.flow, archive)
        total = crc = 0
        for block in archive.blocks():
            content = self._content(block, archive)
            total += len(content)
            crc = zlib.crc32(content, crc)
            progress(total)
            yield content
        if (total, crc) != (archive.length, archive.crc):
            raise archive.damaged()

    @property
    def weights_size(self) -> int:
        """Bytes of the flow's parameters and buffers."""
        return sum(part.numel() * part.element_size() for part in self.flow.state_dict().values())

    def _content(self, block: Block, archive: ArchiveReader) -> bytes:
        """Returns the part of the text that a block holds."""
        with same_numbers(self.flow, archive.header.threads):
            classes = read(self.flow, block, archive).numpy()
        try:
            escapes = _unpacked(block.escapes, archive.header.block_size)
            content = self.symbols.to_bytes(self.symbols.join(classes, escapes))
        except ValueError:
            raise archive.damaged() from None
        if zlib.crc32(content) != block.crc:
            raise computed_otherwise(self.flow, archive)
        return content

    def check(self, header: Header, name: str) -> None:
        """Checks that an archive holds a text of these symbols.

        Raises:
            ArchiveError: If it does not.
        """
        if header.content == Content.CLASSES:
            raise ArchiveError(
                f"{name} holds indices and no text: use dflows.codec.decompress in Python"
            )
        if (header.content, header.vocabulary) != (
            CONTENTS[self.symbols.name],
            self.symbols.digest,
        ):
            raise ArchiveError(
                f"{name} was written by a model of another vocabulary: give the checkpoint that "
                "wrote it"
            )


def _packed(escapes: Escapes) -> bytes:
    """Returns escapes as bytes: the gaps between them and their codes, byte by byte, deflated."""
    places, codes = escapes
    if not len(places):
        return b""
    numbers = np.concatenate([np.diff(places, prepend=-1) - 1, codes]).astype("<u4")
    planes = numbers.view(np.uint8).reshape(-1, 4).T
    return zlib.compress(planes.tobytes(), 9)


def _unpacked(packed: bytes, most: int) -> Escapes:
    """Returns what :func:`_packed` was given, at most so many escapes.

    Raises:
        ValueError: If it cannot have returned this.
    """
    if not packed:
        return np.zeros(0, np.int64), np.zeros(0, np.uint32)
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(packed, 8 * most)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not inflater.eof:
        raise ValueError("there are more escapes than symbols")
    numbers = np.frombuffer(raw, np.uint8).reshape(4, -1).T.copy().view("<u4").flatten()
    gaps, codes = numbers.reshape(2, -1)
    return (gaps.astype(np.int64) + 1).cumsum() - 1, codes.astype(np.uint32)
