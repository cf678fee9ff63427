import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

from datamodules.vocabulary import (
    ByteVocabulary,
    CharacterVocabulary,
    IntegerVocabulary,
    load_vocabulary,
    parse_vocabulary,
)
from dflows.errors import UserError

ODD = (
    "a\r\nb\rc\td  caf\u00e9 e\u0301 \U0001f600\U0001d518 \u2028\u2029\x00\x85\x1c "
    "\ufb00\u00df\u0130\u0131 \ufeff\u200d\u4e2d\uffff\U0010ffff</s>[UNK]"
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def characters(text):
    return CharacterVocabulary(sorted(set(text)))


class TestCharacters:
    def test_odd_text_comes_back(self):
        vocabulary = characters(ODD)
        assert vocabulary.num_classes == len(set(ODD))
        assert vocabulary.decode(vocabulary.encode(ODD)) == ODD

    @given(texts)
    def test_table_agrees_with_the_tokenizer(self, text):
        vocabulary = characters(text + "ab")
        ids = vocabulary.tokenizer.encode(text).ids
        assert vocabulary.encode(text).tolist() == ids
        assert vocabulary.decode(ids) == vocabulary.tokenizer.decode(ids) == text

    @given(texts)
    def test_table_agrees_with_the_tokenizer_on_unknown_characters(self, text):
        vocabulary = CharacterVocabulary("ab\u00e9", unknown=True)
        ids = vocabulary.tokenizer.encode(text).ids
        assert vocabulary.encode(text).tolist() == ids
        assert vocabulary.decode(ids) == vocabulary.tokenizer.decode(ids)
        assert vocabulary.decode(ids) == "".join(c if c in "ab\u00e9" else "\ufffd" for c in text)

    def test_agrees_on_odd_text(self):
        vocabulary = characters(ODD)
        assert vocabulary.encode(ODD).tolist() == vocabulary.tokenizer.encode(ODD).ids

    def test_order_is_that_given(self):
        assert CharacterVocabulary(["b", "\U0001f600", "a"]).encode("ab\U0001f600").tolist() == [
            2,
            0,
            1,
        ]

    @pytest.mark.parametrize("num_classes", [2, 256, 257, 70_000])
    def test_classes_are_held_in_the_smallest_type(self, num_classes):
        symbols = [chr(code) for code in range(0x10000, 0x10000 + num_classes)]
        vocabulary = CharacterVocabulary(symbols)
        encoded = vocabulary.encode("".join(symbols))
        assert np.array_equal(encoded, np.arange(num_classes))
        assert encoded.itemsize == 1 + (num_classes > 256) + 2 * (num_classes > 65536)

    def test_empty_text(self):
        vocabulary = CharacterVocabulary("ab")
        assert vocabulary.encode("").shape == (0,)
        assert vocabulary.decode([]) == ""

    def test_decodes_tensors_and_arrays(self):
        vocabulary = CharacterVocabulary("ab")
        assert vocabulary.decode(torch.tensor([1, 0])) == "ba"
        assert vocabulary.decode(np.array([1, 0], np.uint8)) == "ba"

    def test_unknown_character_is_named_with_its_place(self):
        vocabulary = CharacterVocabulary("ab\n")
        with pytest.raises(UserError) as error:
            vocabulary.encode("ab\nba\u2028a", source="my.txt")
        assert str(error.value) == (
            "my.txt, line 2, column 3: '\\u2028' (U+2028) is not among the 3 symbols "
            "of the vocabulary: remove it"
        )

    @pytest.mark.parametrize("symbol", ["\U0001f600", "c", "\x00", "\u0301", "\U0010ffff"])
    def test_every_unknown_character_is_noticed(self, symbol):
        with pytest.raises(UserError, match=f"column 2.*U\\+{ord(symbol):04X}"):
            CharacterVocabulary("ab").encode("a" + symbol)

    def test_unknown_class(self):
        vocabulary = CharacterVocabulary("ab", unknown=True)
        assert (vocabulary.num_classes, vocabulary.unknown) == (3, 2)
        assert vocabulary.decode(vocabulary.encode("a\U0001f600b")) == "a\ufffdb"

    def test_unknown_class_is_that_of_the_replacement_character(self):
        vocabulary = CharacterVocabulary("a\ufffdb", unknown=True)
        assert (vocabulary.num_classes, vocabulary.unknown) == (3, 1)

    @pytest.mark.parametrize("vocabulary", [CharacterVocabulary("ab"), ByteVocabulary()])
    def test_half_a_surrogate_pair_is_refused(self, vocabulary):
        with pytest.raises(UserError, match=r"character 2 .*'\\ud800'.*surrogate"):
            vocabulary.encode("a\ud800")

    @pytest.mark.parametrize(
        ("symbols", "message"),
        [
            ("", "at least 2 symbols, and this one has 0"),
            ("a", "at least 2 symbols, and this one has 1"),
            ("aba", "'a' stands twice"),
            (["a", "bc"], "not 'bc'"),
            (["a", ""], "not ''"),
            (["a", "\udc00"], "surrogate"),
        ],
    )
    def test_bad_symbols(self, symbols, message):
        with pytest.raises(UserError, match=message):
            CharacterVocabulary(symbols)

    @pytest.mark.parametrize("index", [-1, 2])
    def test_class_out_of_range(self, index):
        with pytest.raises(UserError, match=f"class {index} .* 0 to 1"):
            CharacterVocabulary("ab").decode([0, index])


class TestBytes:
    @given(texts)
    def test_round_trip_and_tokenizer(self, text):
        vocabulary = ByteVocabulary()
        encoded = vocabulary.encode(text)
        assert bytes(encoded.tolist()) == text.encode()
        assert encoded.tolist() == vocabulary.tokenizer.encode(text).ids
        assert vocabulary.decode(encoded) == text
        if text:
            assert vocabulary.tokenizer.decode(encoded.tolist()) == text

    def test_classes_are_byte_values(self):
        vocabulary = ByteVocabulary()
        assert vocabulary.num_classes == 256
        assert vocabulary.decode([0xC3]) == "\ufffd"


class TestIntegers:
    def test_round_trip_and_tokenizer(self):
        vocabulary = IntegerVocabulary(12)
        assert vocabulary.decode([11, 0, 3]) == "11 0 3"
        assert vocabulary.encode(" 11 0\n3").tolist() == [11, 0, 3]
        assert vocabulary.tokenizer.encode("11 0 3").ids == [11, 0, 3]
        assert vocabulary.tokenizer.decode([11, 0, 3]) == "11 0 3"

    @pytest.mark.parametrize("word", ["12", "-1", "x", "01"])
    def test_other_words(self, word):
        with pytest.raises(UserError, match=f"word 2: '{word}' .* 0 to 11"):
            IntegerVocabulary(12).encode(f"3 {word}")

    def test_one_class(self):
        with pytest.raises(UserError, match="num_classes must be at least 2, not 1"):
            IntegerVocabulary(1)


VOCABULARIES = [
    characters(ODD),
    CharacterVocabulary("ba"),
    CharacterVocabulary("ba", unknown=True),
    ByteVocabulary(),
    IntegerVocabulary(12),
]


class TestFile:
    @pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=repr)
    def test_round_trip(self, vocabulary, tmp_path):
        path = vocabulary.save(tmp_path / "new" / "folder")
        assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]
        for loaded in (load_vocabulary(path), load_vocabulary(path.parent)):
            assert loaded == vocabulary
            assert hash(loaded) == hash(vocabulary)
            assert loaded.to_json() == vocabulary.to_json()
        assert Tokenizer.from_file(str(path)).get_vocab_size() == vocabulary.num_classes

    def test_different_vocabularies_are_unequal(self):
        assert len(set(VOCABULARIES)) == len(VOCABULARIES)
        assert CharacterVocabulary("ab") != CharacterVocabulary("ba")
        assert CharacterVocabulary("a\ufffd") != CharacterVocabulary("a\ufffd", unknown=True)
        assert CharacterVocabulary("ab") != "ab"

    def test_interrupted_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = CharacterVocabulary("ab").save(tmp_path)
        monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            CharacterVocabulary("abc").save(tmp_path)
        assert load_vocabulary(path) == CharacterVocabulary("ab")
        assert list(tmp_path.iterdir()) == [path]

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot read .*tokenizer.json: No such file"):
            load_vocabulary(tmp_path)

    def test_truncated(self, tmp_path):
        path = CharacterVocabulary("ab").save(tmp_path)
        path.write_text(path.read_text()[:-20])
        with pytest.raises(UserError, match=r"tokenizer.json is damaged"):
            load_vocabulary(path)

    def test_not_text(self, tmp_path):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="not text in UTF-8"):
            load_vocabulary(path)

    @pytest.mark.parametrize(
        "foreign",
        [
            "[]",
            "{}",
            '{"model": null}',
            json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}}),
            Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str(),
            Tokenizer(models.BPE({"a": 0, "b": 2}, [])).to_str(),
            Tokenizer(models.BPE({"a": 0, "b": 1}, [])).to_str(),
            Tokenizer(models.WordLevel({"cat": 0, "dog": 1}, "dog")).to_str(),
            Tokenizer(models.WordPiece({"a": 0, "b": 1}, unk_token="a")).to_str(),
            Tokenizer(models.Unigram([("a", 0.0), ("b", 0.0)])).to_str(),
        ],
    )
    def test_foreign(self, foreign):
        with pytest.raises(UserError, match="not one that dflows wrote"):
            parse_vocabulary(foreign)

    def test_normalized(self):
        tokenizer = CharacterVocabulary("ab").tokenizer
        tokenizer.normalizer = normalizers.Lowercase()
        with pytest.raises(UserError, match="not one that dflows wrote"):
            parse_vocabulary(tokenizer.to_str())
