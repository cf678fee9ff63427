import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.vocabulary import ByteVocabulary, CharacterVocabulary, IntegerVocabulary
from dflows import Context, flows
from dflows.backbones import LSTM
from dflows.codec import ArchiveError, TextCodec, compress
from dflows.codec.archive import ArchiveReader, ArchiveWriter, Block
from dflows.codec.flows import header_of
from dflows.codec.texts import CONTENTS, _packed, _unpacked
from dflows.errors import UserError
from dflows.orderings import Parity
from tests.dflows.small import make_flow

VOCABULARIES = {
    "characters": CharacterVocabulary("abc \n"),
    "with an unknown": CharacterVocabulary("abc \n", unknown=True),
    "bytes": ByteVocabulary(),
}
TEXTS = {
    "nothing": b"",
    "one character": b"a",
    "one byte that is no character": b"\xff",
    "a window": b"abca",
    "a window and a rest": b"abcab",
    "many blocks": b"abc cba\n" * 30,
    "ends of lines": b"a\r\nb\rc\nd",
    "a byte order mark": b"\xef\xbb\xbfabc",
    "nulls": b"\0\0a\0",
    "no UTF-8": b"ab\xc3(\xed\xa0\x80\xf0\x9f\x98abc\xf0",
    "half a pair, twice": b"\xed\xa0\xbd\xed\xb8\x80",
    "other characters": "ünïcödé 𝒳 \u2028\ufffd\ud7ff".encode(),
    "the replacement character": "a\ufffdb\u2603c".encode() * 9,
    "nothing that is known": b"XYZ" * 40,
}


def codec_of(vocabulary, length=4):
    return TextCodec(make_flow(vocabulary.num_classes, length), vocabulary.text_symbols())


def archived(codec, text, **options):
    file = io.BytesIO()
    totals = codec.compress(io.BytesIO(text), file, **options)
    assert totals.size == len(file.getvalue())
    assert totals.content == len(text)
    return file.getvalue(), totals


def unarchived(codec, archive):
    return b"".join(codec.decompress(ArchiveReader(io.BytesIO(archive))))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_every_text_comes_back(vocabulary, text, batch_size):
    codec = codec_of(vocabulary)
    archive, _ = archived(codec, text, batch_size=batch_size)
    assert unarchived(codec, archive) == text


CODECS = [codec_of(vocabulary) for vocabulary in VOCABULARIES.values()]


@given(text=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_bytes_come_back(text):
    for codec in CODECS:
        assert unarchived(codec, archived(codec, text, batch_size=9)[0]) == text


class Pipe(io.RawIOBase):
    """What gives a few bytes at a time."""

    def __init__(self, content):
        self.rest = content

    def read(self, size=-1):
        part, self.rest = self.rest[: min(size, 3)], self.rest[min(size, 3) :]
        return part


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
def test_a_pipe_gives_the_archive_of_a_file(vocabulary):
    codec, text = codec_of(vocabulary), "abc é𝒳 cba\n".encode() * 20
    file = io.BytesIO()
    codec.compress(Pipe(text), file, batch_size=3)
    assert file.getvalue() == archived(codec, text, batch_size=3)[0]


def test_what_is_told():
    codec, told = codec_of(VOCABULARIES["characters"]), []
    archive, totals = archived(codec, "abcé\xffd".encode() * 8, batch_size=4, progress=told.append)
    assert (totals.symbols, totals.escaped) == (48, 24)
    assert told == [21, 42, 64]
    assert codec.symbols.name == "characters"
    back = []
    for _ in codec.decompress(ArchiveReader(io.BytesIO(archive)), back.append):
        pass
    assert back == told
    assert codec.weights_size == sum(
        part.numel() * part.element_size() for part in codec.flow.state_dict().values()
    )


def test_escapes_cost_little():
    codec = codec_of(CharacterVocabulary("ab"), 64)
    plain = archived(codec, b"ab" * 5000)[0]
    some = archived(codec, ("ab" * 49 + "é").encode() * 100 + b"ab" * 50)[0]
    assert len(some) < len(plain) + 100


def test_a_text_of_another_vocabulary_or_an_array_is_refused():
    codec = codec_of(CharacterVocabulary("abc"))
    other = TextCodec(codec.flow, CharacterVocabulary("abd").text_symbols())
    archive = archived(codec, b"abc")[0]
    with pytest.raises(ArchiveError, match="another vocabulary: give the checkpoint that wrote it"):
        unarchived(other, archive)
    with pytest.raises(ArchiveError, match="holds indices and no text"):
        unarchived(codec, compress(codec.flow, torch.zeros(2, 4, dtype=torch.long)))


@pytest.mark.parametrize("vocabulary", ["integers", "context"])
def test_what_has_no_text_is_refused(vocabulary):
    if vocabulary == "integers":
        with pytest.raises(UserError, match=r"IntegerVocabulary.*: use dflows\.codec\.compress"):
            IntegerVocabulary(5).text_symbols()
        return
    flow = flows.stack(3, 4, [Parity()], lambda: LSTM(8, bidirectional=True), context=Context(2))
    with pytest.raises(UserError, match="is conditional, and a text has no context"):
        TextCodec(flow, CharacterVocabulary("abc").text_symbols())


class TestCraftedEscapes:
    """Their CRCs are right, as a program writes them."""

    @pytest.fixture
    def codec(self):
        return codec_of(CharacterVocabulary("abc"))

    def refused(self, codec, escapes, values=0):
        header = header_of(codec.flow, CONTENTS[codec.symbols.name], 4, 1)
        header = replace(header, vocabulary=codec.symbols.digest)
        file = io.BytesIO()
        writer = ArchiveWriter(file, header)
        writer.write(Block(values, b"", escapes, 0, 0), b"")
        writer.close()
        with pytest.raises(ArchiveError, match="damaged"):
            unarchived(codec, file.getvalue())

    @pytest.mark.parametrize(
        ("places", "codes"), [([5], [65]), ([0], [0x110000]), ([0], [0xD800]), ([0, 7], [65, 66])]
    )
    def test_places_and_codes_that_cannot_be(self, codec, places, codes):
        self.refused(codec, _packed((np.array(places), np.array(codes, np.uint32))))

    def test_what_is_not_packed(self, codec):
        self.refused(codec, b"no zlib")
        self.refused(codec, _packed((np.arange(3), np.arange(3, dtype=np.uint32)))[:-3])

    def test_what_unpacks_to_more_than_a_block(self, codec):
        self.refused(codec, _packed((np.arange(10**6), np.full(10**6, 65, np.uint32))))

    def test_of_bytes(self):
        self.refused(
            codec_of(ByteVocabulary()), _packed((np.array([0]), np.array([65], np.uint32)))
        )


@given(
    st.dictionaries(st.integers(0, 1 << 20), st.integers(0, 0x10FFFF), min_size=1, max_size=50).map(
        lambda found: sorted(found.items())
    )
)
def test_escapes_are_unpacked_as_they_were_packed(found):
    places, codes = map(np.array, zip(*found, strict=True))
    packed = _packed((places, codes.astype(np.uint32)))
    for one, other in zip(_unpacked(packed, 1 << 20), (places, codes), strict=True):
        assert np.array_equal(one, other)
