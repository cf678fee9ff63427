import io
import random
import zlib
from dataclasses import replace

import pytest
import torch

from datamodules.vocabulary import CharacterVocabulary
from dflows.codec import ArchiveError, TextCodec, compress, decompress
from dflows.codec.archive import ArchiveReader, ArchiveWriter, Block, Content, Header
from tests.dflows.small import make_flow

HEADER = Header(
    Content.CLASSES, 3, 4, 10, 2, 1, bytes(range(16)), bytes(8), (7, 4), "float32", "torch, cpu"
)
BLOCK = Block(28, b"payload!", b"escapes", 17, zlib.crc32(b"content"))
MUTATIONS = 1200


def written(*blocks):
    file = io.BytesIO()
    writer = ArchiveWriter(file, HEADER)
    for block in blocks:
        writer.write(block, b"content")
    writer.close()
    assert writer.size == len(file.getvalue())
    return file.getvalue()


def test_what_is_written_is_read():
    blocks = [replace(BLOCK, values=values) for values in (16, 12)]
    reader = ArchiveReader(io.BytesIO(written(*blocks)))
    assert reader.header == HEADER
    assert [*reader.blocks()] == blocks
    assert (reader.length, reader.crc) == (14, zlib.crc32(b"contentcontent"))
    assert [*reader.blocks()] == blocks


def test_the_format_of_version_1_stays():
    """docs/guide/archives.md describes these bytes."""
    expected = (
        "89 64666c6f77730a 01 4f00"
        "00 03000000 04000000 0a000000 02000000 0100 000102030405060708090a0b0c0d0e0f"
        "0000000000000000 02 0700000000000000 0400000000000000 07 666c6f61743332"
        "0a 746f7263682c20637075"
    )
    found = written(BLOCK)
    start = bytes.fromhex(expected)
    assert found[: len(start)].hex() == start.hex()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no archive of dflows: give one of dflows.compress"),
        (b"PK\3\4 something else", "is no archive"),
        (b"\x89dflo", "ends too early"),
        (written(BLOCK)[:30], "ends too early"),
        (written(BLOCK)[:-1], "ends too early"),
        (written(BLOCK)[:-40], "ends too early"),
        (written(BLOCK) + b"\0", "is damaged: take it from its source again"),
        (written(BLOCK).replace(b"payload", b"pAyload"), "is damaged"),
        (written(BLOCK).replace(b"float32", b"float64"), "is damaged"),
        (written(BLOCK)[:8] + b"\2" + written(BLOCK)[9:], "has the format 2, .* update dflows"),
    ],
)
def test_what_is_no_archive_is_refused(content, message):
    with pytest.raises(ArchiveError, match=f"^book.dfl {message}"):
        ArchiveReader(io.BytesIO(content), "book.dfl").check()


@pytest.mark.parametrize(
    "header",
    [
        {"length": 0},
        {"events": 0},
        {"length": 1 << 20, "events": 1 << 20},
        {"threads": 0},
        {"threads": 2000},
        {"shape": (7, 2)},
        {"shape": (1 << 63, 0, 4)},
    ],
)
def test_a_crafted_header_is_refused(header):
    file = io.BytesIO()
    ArchiveWriter(file, Header(**{**vars(HEADER), **header})).close()
    file.seek(0)
    with pytest.raises(ArchiveError, match="damaged"):
        ArchiveReader(file)


def test_a_crafted_block_is_refused():
    for changes in (
        {"values": 10**9},
        {"values": 24},
        {"values": 26},
        {"payload": bytes(1000)},
        {"escapes": bytes(10_000)},
    ):
        with pytest.raises(ArchiveError, match="damaged"):
            ArchiveReader(io.BytesIO(written(replace(BLOCK, **changes)))).check()


def mutated(content, generator):
    """A file with a few of its bytes changed, lost or repeated."""
    found = bytearray(content)
    for _ in range(generator.choice([1, 1, 1, 2, 5])):
        place = generator.randrange(len(found))
        kind = generator.randrange(5)
        if kind < 2:
            found[place] ^= 1 << generator.randrange(8)
        elif kind == 2:
            found[place] = generator.randrange(256)
        elif kind == 3:
            del found[place : place + generator.choice([1, 4, 1000])]
        else:
            found[place:place] = found[place : place + generator.choice([1, 4, 29])]
        if not found:
            break
    return bytes(found)


def test_no_mutation_of_an_array_is_decoded_to_something_else():
    flow, y = make_flow(3, 4), torch.randint(3, (30, 4))
    archive = compress(flow, y, batch_size=12)
    generator, refused = random.Random(0), 0
    for _ in range(MUTATIONS):
        other = mutated(archive, generator)
        try:
            assert torch.equal(decompress(flow, other), y)
            assert other == archive
        except ArchiveError:
            refused += 1
    assert refused > MUTATIONS * 0.99


@pytest.mark.parametrize(("checked", "number"), [(True, MUTATIONS), (False, 100)])
def test_no_mutation_of_a_text_is_decoded_to_something_else(checked, number):
    codec = TextCodec(make_flow(3, 4), CharacterVocabulary("abc").text_symbols())
    text = ("abcabbcaé".encode() + b"\xffbacbcacb") * 3
    file = io.BytesIO()
    codec.compress(io.BytesIO(text), file, batch_size=4)
    generator, refused = random.Random(0), 0
    for _ in range(number):
        other = mutated(file.getvalue(), generator)
        found = b""
        try:
            reader = ArchiveReader(io.BytesIO(other))
            if checked:
                reader.check()
            for part in codec.decompress(reader):
                found += part
            assert other == file.getvalue()
        except ArchiveError:
            refused += 1
            assert not (checked and found)
        assert text.startswith(found)
    assert refused > number * 0.95


def test_every_bit_of_an_archive_is_guarded():
    flow, y = make_flow(3, 4), torch.randint(3, (5, 4))
    archive = compress(flow, y)
    for place in range(8 * len(archive)):
        other = bytearray(archive)
        other[place // 8] ^= 1 << place % 8
        with pytest.raises(ArchiveError):
            decompress(flow, bytes(other))
