"""The file format of archives: a header, blocks, and an end, each with a CRC of its own.

docs/guide/archives.md describes it.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from dflows.errors import UserError

__all__ = [
    "MOST_THREADS",
    "MOST_VALUES",
    "ArchiveError",
    "ArchiveReader",
    "ArchiveWriter",
    "Block",
    "Content",
    "Header",
]

MAGIC = b"\x89dflows\n"
VERSION = 1
MOST_VALUES = 1 << 24
"""Values of a block."""

MOST_THREADS = 1 << 10
"""Threads that an archive may ask for."""

_START = struct.Struct("<8sBH")
_FIXED = struct.Struct("<BIIIIH16s8s")
_HEAD = struct.Struct("<BIIIII")
_END = struct.Struct("<BIQI")
_CRC = struct.Struct("<I")
_BLOCK, _LAST = 1, 0


class Content:
    """What an archive holds."""

    CLASSES, CHARACTERS, BYTES = range(3)


class ArchiveError(UserError):
    """The refusal of an archive that is damaged, or none, or not of this model."""


@dataclass(frozen=True)
class Header:
    """Creates the header of an archive.

    Args:
        content: What it holds, of :class:`Content`.
        num_classes: K.
        length: The values of an event, d; the last event of a block may be shorter.
        events: The most events of a block.
        passes: Passes of the flow that wrote it.
        threads: Threads of the CPU that it computed with.
        fingerprint: 16 bytes that tell flows apart.
        vocabulary: 8 bytes that tell vocabularies apart.
        shape: The shape of an array of indices (…, d).
        dtype: Floating type of the flow.
        computed_by: The device and the library.
    """

    content: int
    num_classes: int
    length: int
    events: int
    passes: int
    threads: int
    fingerprint: bytes
    vocabulary: bytes = bytes(8)
    shape: tuple[int, ...] = ()
    dtype: str = ""
    computed_by: str = ""

    def pack(self) -> bytes:
        """Returns the bytes of the header, up to its CRC."""
        numbers = (self.num_classes, self.length, self.events, self.passes, self.threads)
        body = _FIXED.pack(self.content, *numbers, self.fingerprint, self.vocabulary)
        body += struct.pack(f"<B{len(self.shape)}Q", len(self.shape), *self.shape)
        for word in (self.dtype, self.computed_by):
            body += struct.pack("<B", len(word.encode())) + word.encode()
        return _START.pack(MAGIC, VERSION, len(body)) + body

    @classmethod
    def unpack(cls, body: bytes) -> "Header":
        """Returns the header of the bytes between its length and its CRC."""
        content, *numbers, fingerprint, vocabulary = _FIXED.unpack_from(body)
        num_classes, length, events, passes, threads = numbers
        rest = body[_FIXED.size :]
        shape = struct.unpack_from(f"<{rest[0]}Q", rest, 1)
        rest = rest[1 + 8 * len(shape) :]
        words = []
        for _ in range(2):
            words.append(rest[1 : 1 + rest[0]].decode())
            rest = rest[1 + rest[0] :]
        dtype, computed_by = words
        return cls(
            content=content,
            num_classes=num_classes,
            length=length,
            events=events,
            passes=passes,
            threads=threads,
            fingerprint=fingerprint,
            vocabulary=vocabulary,
            shape=shape,
            dtype=dtype,
            computed_by=computed_by,
        )

    @property
    def block_size(self) -> int:
        """The most values of a block."""
        return self.length * self.events


@dataclass(frozen=True)
class Block:
    """Creates a block of an archive.

    Args:
        values: How many values are encoded.
        payload: What the entropy coder made of them.
        escapes: What the model cannot tell.
        probe: The check value of the first passes.
        crc: The CRC-32 of what the block holds, decoded.
    """

    values: int
    payload: bytes
    escapes: bytes
    probe: int
    crc: int


class ArchiveWriter:
    """Creates a writer of an archive, and writes its header.

    Args:
        file: What is written to.
        header: The header.
    """

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._file = file
        self._blocks = self._length = self._crc = 0
        self.size = 0
        self._write(header.pack())

    def _write(self, part: bytes) -> None:
        part += _CRC.pack(zlib.crc32(part))
        self._file.write(part)
        self.size += len(part)

    def write(self, block: Block, content: bytes) -> None:
        """Writes a block, which holds this content."""
        sizes = (block.values, len(block.payload), len(block.escapes))
        self._write(_HEAD.pack(_BLOCK, *sizes, block.probe, block.crc))
        self._write(block.payload + block.escapes)
        self._blocks += 1
        self._length += len(content)
        self._crc = zlib.crc32(content, self._crc)

    def close(self) -> None:
        """Writes the end."""
        self._write(_END.pack(_LAST, self._blocks, self._length, self._crc))


class ArchiveReader:
    """Creates a reader of an archive, and reads its header.

    Args:
        file: What is read, at the archive's beginning; it can be sought in.
        name: What errors call it.

    Raises:
        ArchiveError: If it is no archive, is damaged, or of a newer version.
    """

    def __init__(self, file: BinaryIO, name: str = "the archive") -> None:
        self._file, self.name = file, name
        start = file.read(_START.size)
        magic = start[: len(MAGIC)]
        if magic != MAGIC[: len(magic)] or not magic:
            raise ArchiveError(f"{name} is no archive of dflows: give one of dflows.compress")
        if len(start) < _START.size:
            raise self._truncated()
        _, version, size = _START.unpack(start)
        if version != VERSION:
            raise ArchiveError(
                f"{name} has the format {version}, and this dflows reads {VERSION}: update dflows, "
                "or take the file from its source again if it may be damaged"
            )
        body = self._checked(size, start)
        try:
            self.header = Header.unpack(body[_START.size :])
        except (struct.error, IndexError, UnicodeDecodeError):
            raise self.damaged() from None
        header = self.header
        sane = 1 <= header.block_size <= MOST_VALUES and 1 <= header.threads <= MOST_THREADS
        shape = header.shape
        if not sane or (shape and (shape[-1] != header.length or max(shape) >= 1 << 48)):
            raise self.damaged()
        self._first = file.tell()

    def _truncated(self) -> ArchiveError:
        return ArchiveError(f"{self.name} ends too early: take it from its source again")

    def damaged(self) -> ArchiveError:
        """Returns the error of an archive whose bytes are not those that were written."""
        return ArchiveError(f"{self.name} is damaged: take it from its source again")

    def _checked(self, size: int, before: bytes = b"") -> bytes:
        """Reads so many bytes, and their CRC together with those read before."""
        part = self._file.read(size + _CRC.size)
        if len(part) < size + _CRC.size:
            raise self._truncated()
        part = before + part
        body, crc = part[: -_CRC.size], part[-_CRC.size :]
        if zlib.crc32(body) != _CRC.unpack(crc)[0]:
            raise self.damaged()
        return body

    def blocks(self) -> Iterator[Block]:
        """Yields the blocks, and checks the end behind them.

        Raises:
            ArchiveError: If the archive is damaged.
        """
        self._file.seek(self._first)
        number = total = 0
        while True:
            tag = self._file.read(1)
            if tag == bytes([_LAST]):
                break
            if tag != bytes([_BLOCK]):
                raise self.damaged() if tag else self._truncated()
            head = self._checked(_HEAD.size - 1, tag)
            _, values, payload, escapes, probe, crc = _HEAD.unpack(head)
            if not self._is_sane(values, payload, escapes):
                raise self.damaged()
            body = self._checked(payload + escapes)
            number += 1
            total += values
            yield Block(values, body[:payload], body[payload:], probe, crc)
        blocks, self.length, self.crc = _END.unpack(self._checked(_END.size - 1, tag))[1:]
        wanted = math.prod(self.header.shape) if self.header.shape else total
        if blocks != number or total != wanted or self._file.read(1):
            raise self.damaged()

    def _is_sane(self, values: int, payload: int, escapes: int) -> bool:
        """Says whether a block can be of these sizes, before so much is read."""
        header = self.header
        whole = not header.shape or values % header.length == 0
        # No value takes more than 24 bits, and no escape more than 8 bytes.
        fits = payload <= 4 * values + 64 and escapes <= 16 * header.block_size + 64
        return values <= header.block_size and whole and fits

    def check(self) -> None:
        """Checks every byte, and decodes none.

        Raises:
            ArchiveError: If the archive is damaged.
        """
        for _ in self.blocks():
            pass
