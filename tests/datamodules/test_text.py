import os
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.sources import KingJames, LocalText, TextSource
from datamodules.text import TextDataModule
from datamodules.vocabulary import ByteVocabulary, CharacterVocabulary, IntegerVocabulary
from dflows.errors import UserError
from tests.datamodules.process import Process

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

ODD = "A caf\u00e9, e\u0301t\u00e9\r\n\u2028\x00\U0001f600 \u4e2d\u6587\n"


class Strings(TextSource):
    """A source of strings: one for each split, or one that is cut."""

    def __init__(self, *texts, fractions=None):
        super().__init__(fractions)
        streams = ["all"] if len(texts) == 1 else ["train", "valid", "test"]
        self._texts = dict(zip(streams, texts, strict=True))

    def describe(self, stream):
        return f"string {stream}"

    def pieces(self, stream):
        text = self._texts[stream]
        for begin in range(0, len(text), 11):
            yield self.describe(stream), text[begin : begin + 11]


def cut(text, fractions=(0.9, 0.05, 0.05)):
    return Strings(text, fractions=fractions)


def read(loader):
    return torch.cat([batch.flatten() for batch in loader])


@pytest.fixture(params=[False, True], ids=["memory", "streaming"])
def streaming(request):
    return request.param


class TestText:
    def test_splits_come_back(self, streaming):
        texts = ODD * 9, ODD[3:] * 2, ODD[::-1]
        data = TextDataModule(Strings(*texts), 8, streaming=streaming)
        data.setup("fit")
        assert data.decode(read(data.val_dataloader())) == texts[1]
        assert data.decode(read(data.test_dataloader())) == texts[2]
        assert [data.characters(split) for split in ("train", "valid", "test")] == [
            len(text) for text in texts
        ]
        batch = next(iter(data.train_dataloader()))
        assert batch.shape == (32, 8)
        assert batch.dtype == torch.int64
        assert all(data.decode(row) in texts[0] for row in batch)

    def test_one_text_is_cut_by_position(self, streaming):
        text = ODD * 23
        data = TextDataModule(cut(text), 8, streaming=streaming)
        low, high = len(text) * 90 // 100, len(text) * 95 // 100
        assert data.decode(read(data.val_dataloader())) == text[low:high]
        assert data.decode(read(data.test_dataloader())) == text[high:]
        rows = read(next(iter(data.train_dataloader())) for _ in range(50))
        assert torch.equal(torch.bincount(rows) > 0, data.class_counts() > 0)
        assert data.characters() == low

    def test_streaming_evaluates_and_counts_the_same(self):
        text = 2 * (ODD * 20)[: len(ODD) * 18]
        memory, streamed = (
            TextDataModule(cut(text), 8, eval_batch_size=3, streaming=streaming)
            for streaming in (False, True)
        )
        for split in ("train", "valid", "test"):
            assert torch.equal(memory.class_counts(split), streamed.class_counts(split))
        for first, second in zip(memory.test_dataloader(), streamed.test_dataloader(), strict=True):
            assert torch.equal(first, second)

    def test_class_counts(self, streaming):
        data = TextDataModule(Strings("aabac", "bcb", "cccc"), 2, streaming=streaming)
        assert data.class_counts().tolist() == [3, 1, 1]
        assert data.class_counts().dtype == torch.int64
        assert data.class_counts("valid").tolist() == [0, 2, 1]
        assert data.class_counts("test").tolist() == [0, 0, 4]
        chunks = [*data.training_chunks()]
        assert sum(map(len, chunks)) == data.characters("train")
        assert torch.from_numpy(chunks[0]).bincount(minlength=3).tolist() == [3, 1, 1]

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_every_character_is_scored_once(self, ranks, workers, streaming):
        text = ODD * 11
        found, batches = 0, []
        for rank in range(ranks):
            data = TextDataModule(
                Strings(text, text, text),
                8,
                eval_batch_size=3,
                num_workers=workers,
                streaming=streaming,
            )
            data.trainer = Process(rank, ranks)
            own = list(data.test_dataloader())
            found += sum(batch.numel() for batch in own)
            batches += [(rank + ranks * number, batch) for number, batch in enumerate(own)]
        assert found == len(text)
        together = torch.cat([batch.flatten() for _, batch in sorted(batches, key=lambda b: b[0])])
        assert data.decode(together) == text
        assert {batch.shape[-1] for _, batch in batches} == {8, len(text) % 8}

    @pytest.mark.parametrize("workers", [0, 2])
    def test_ranks_share_the_batches_of_one_process(self, workers):
        batches = []
        for rank in range(2):
            data = TextDataModule(cut(ODD * 50), 8, 3, num_workers=workers)
            data.trainer = Process(rank, 2)
            batches.append(iter(data.train_dataloader()))
        alone = iter(TextDataModule(cut(ODD * 50), 8, 6).train_dataloader())
        for _ in range(5):
            assert torch.equal(torch.cat([next(rank) for rank in batches]), next(alone))

    def test_seeds_differ(self):
        first, second, again = (
            next(iter(TextDataModule(cut(ODD * 50), 8, seed=seed).train_dataloader()))
            for seed in (0, 1, 0)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("ranks", [1, 2])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_consecutive_batches_go_on_whatever_the_processes(self, ranks, workers):
        parts = []
        for rank in range(ranks):
            data = TextDataModule(cut(ODD * 20), 8, 4 // ranks, stateful=True, num_workers=workers)
            data.trainer = Process(rank, ranks)
            parts.append(torch.stack(list(islice(data.train_dataloader(), 6))))
        batches = torch.cat(parts, dim=1)
        assert batches.shape == (6, 4, 8)
        text = 2 * (ODD * 20)[: len(ODD) * 18]
        for row in batches.unbind(1):
            assert data.decode(row.flatten()) in text
        if ranks == 2:
            alone = TextDataModule(cut(ODD * 20), 8, 4, stateful=True)
            assert torch.equal(torch.stack(list(islice(alone.train_dataloader(), 6))), batches)

    @pytest.mark.parametrize("stateful", [False, True])
    def test_batches_of_a_file_are_those_of_memory(self, stateful):
        memory, file = (
            TextDataModule(cut(ODD * 20), 8, 4, stateful=stateful, streaming=streaming)
            for streaming in (False, True)
        )
        first, second = (
            torch.cat(list(islice(data.train_dataloader(), 100))) for data in (memory, file)
        )
        assert torch.equal(first, second)

    def test_the_file_of_a_text_is_found_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        path = tmp_path / "a.txt"
        path.write_text(ODD * 20, encoding="utf-8")
        reads = []
        monkeypatch.setattr(
            LocalText, "blocks", lambda *a: reads.append(a) or TextSource.blocks(*a)
        )

        def rows():
            data = TextDataModule(LocalText(path=str(path)), 8, 4, streaming=True)
            data.setup("fit")
            return next(iter(data.train_dataloader()))

        first, number = rows(), len(reads)
        assert number
        assert torch.equal(rows(), first)
        assert len(reads) == number
        # A file that is another one, of equal size too, is read again.
        path.write_text(ODD[::-1] * 20, encoding="utf-8")
        os.utime(path, (1, 1))
        assert not torch.equal(rows(), first)
        assert len(reads) == 2 * number

    def test_loaders_leave_the_global_generator_alone(self):
        data = TextDataModule(cut(ODD * 50), 8)
        state = torch.get_rng_state()
        next(iter(data.train_dataloader()))
        next(iter(data.val_dataloader()))
        assert torch.equal(torch.get_rng_state(), state)

    def test_evaluation_of_a_short_split(self):
        data = TextDataModule(Strings("abcabc", "ab", "abca"), 5)
        assert [batch.tolist() for batch in data.val_dataloader()] == [[[0, 1]]]

    def test_limit(self, streaming):
        data = TextDataModule(
            cut(ODD * 50), 8, eval_batch_size=2, max_eval_characters=20, streaming=streaming
        )
        full = TextDataModule(cut(ODD * 50), 8)
        scored = read(data.test_dataloader())
        assert torch.equal(scored, read(full.test_dataloader())[:20])
        assert data.characters("test") == 20
        assert not data.is_complete("test")
        assert data.is_complete("train")
        assert full.is_complete("test")
        assert torch.equal(
            data.class_counts("test"), torch.bincount(scored, minlength=data.num_classes)
        )
        assert TextDataModule(cut(ODD), 8, max_eval_characters=10**6).is_complete("valid")


class TestVocabulary:
    def test_of_the_training_split(self, streaming):
        data = TextDataModule(Strings("cab\n" * 3, "a", "b"), 4, streaming=streaming)
        assert data.vocabulary == CharacterVocabulary("\nabc")
        assert data.encode("cab").tolist() == [3, 1, 2]
        assert data.encode("cab").dtype == torch.int64
        assert data.decode([3, 1, 2]) == "cab"

    def test_of_the_corpus_whatever_the_limit(self, streaming):
        data = TextDataModule(
            Strings("abab", "xxaz", "yyx"),
            2,
            vocabulary="corpus",
            max_eval_characters=2,
            streaming=streaming,
        )
        assert data.vocabulary == CharacterVocabulary("abxyz")
        assert data.class_counts().tolist() == [2, 2, 0, 0, 0]
        assert data.decode(read(data.val_dataloader())) == "xx"

    def test_given_characters(self):
        data = TextDataModule(Strings("aab", "a", "b"), 2, vocabulary=["b", "z", "a"])
        assert data.class_counts().tolist() == [1, 0, 2]

    def test_given_file(self, tmp_path):
        first = TextDataModule(Strings("xyxz", "x", "y"), 2)
        path = first.save_vocabulary(tmp_path)
        assert path == tmp_path / "tokenizer.json"
        for given in (path, tmp_path):
            data = TextDataModule(Strings("xxxy", "x", "y"), 2, vocabulary=str(given))
            assert data.vocabulary == first.vocabulary

    def test_file_of_bytes(self, tmp_path):
        ByteVocabulary().save(tmp_path)
        data = TextDataModule(Strings("caf\u00e9 ", "x", "y"), 2, vocabulary=str(tmp_path))
        assert data.characters() == 6

    def test_bytes(self, streaming):
        text = ODD * 30
        data = TextDataModule(cut(text), 8, vocabulary="bytes", streaming=streaming)
        assert data.num_classes == 256
        content = text.encode()
        low, high = len(content) * 90 // 100, len(content) * 95 // 100
        assert bytes(read(data.val_dataloader()).tolist()) == content[low:high]
        assert bytes(read(data.test_dataloader()).tolist()) == content[high:]
        assert (
            data.class_counts().tolist() == np.bincount(list(content[:low]), minlength=256).tolist()
        )

    def test_unknown_symbol_is_named_with_its_place(self, streaming):
        source = Strings("abc \n" * 9, "ab\nc a\nbc\u2028", "a")
        with pytest.raises(UserError) as error:
            TextDataModule(source, 4, streaming=streaming).setup("fit")
        assert str(error.value) == (
            "string valid, line 3, column 3, in the split valid: '\\u2028' (U+2028) is not among "
            "the 5 symbols of the vocabulary: set unknown: true, or vocabulary: corpus to give it "
            "a class, or remove it"
        )

    def test_place_counts_from_the_beginning_of_the_file(self, tmp_path):
        path = tmp_path / "my.txt"
        path.write_text("ab\n" * 300 + "ab\u00e9\n" + "ab\n" * 3)
        with pytest.raises(
            UserError, match=r"my\.txt, line 301, column 3, .* '\u00e9' \(U\+00E9\)"
        ):
            TextDataModule(LocalText(path=str(path)), 4).setup("fit")

    def test_unknown_class(self, streaming):
        source = Strings("abab", "axb", "\U0001f600b")
        data = TextDataModule(source, 2, unknown=True, streaming=streaming)
        assert data.num_classes == 3
        assert data.decode(read(data.val_dataloader())) == "a\ufffdb"
        assert data.class_counts("test").tolist() == [0, 1, 1]

    def test_unknown_in_a_prompt(self):
        with pytest.raises(UserError, match="the text, line 1, column 2: 'x'"):
            TextDataModule(Strings("abab", "a", "b"), 2).encode("ax")

    def test_one_symbol(self):
        with pytest.raises(UserError, match=r"string train has no symbol but 'a': .* at least 2"):
            _ = TextDataModule(Strings("aaaa", "a", "a"), 2).num_classes

    def test_integers(self, tmp_path):
        IntegerVocabulary(3).save(tmp_path)
        with pytest.raises(UserError, match="a vocabulary of integers, not of characters"):
            TextDataModule(vocabulary=str(tmp_path))

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match="cannot read the vocabulary"):
            TextDataModule(vocabulary=str(tmp_path / "none.json"))


class TestErrors:
    def test_window_longer_than_the_text(self, streaming):
        data = TextDataModule(Strings("abcab", "ab", "ab"), 6, streaming=streaming)
        with pytest.raises(UserError) as error:
            data.setup("fit")
        assert str(error.value) == (
            "a window of length 6 is longer than the 5 characters of string train: "
            "set length to 5 or less, or give more text"
        )

    def test_window_longer_than_the_part(self):
        with pytest.raises(UserError, match="the 18 characters of the split train of string all"):
            TextDataModule(cut("ab" * 10), 19).setup("fit")

    def test_part_without_characters(self):
        with pytest.raises(UserError, match="the split valid of string all is empty"):
            TextDataModule(cut("ababa"), 2).setup("fit")

    def test_missing_file_of_a_later_split_shows_before_training(self, tmp_path):
        path = tmp_path / "text"
        path.write_text("text")
        data = TextDataModule(LocalText(str(path), str(path), str(tmp_path / "none")), 2)
        with pytest.raises(UserError, match=r"cannot read .*none"):
            data.setup("fit")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("length", 0),
            ("batch_size", 0),
            ("eval_batch_size", 0),
            ("num_workers", -1),
            ("seed", -1),
            ("max_eval_characters", 0),
        ],
    )
    def test_ranges(self, key, value):
        with pytest.raises(UserError, match=f"{key} must be at least {value + 1}, not {value}"):
            TextDataModule(**{key: value})


def test_only_what_a_stage_needs_is_read(tmp_path):
    CharacterVocabulary("ab").save(tmp_path)
    (tmp_path / "test.txt").write_text("abba")
    source = LocalText("none", "none", str(tmp_path / "test.txt"))
    data = TextDataModule(source, 3, vocabulary=str(tmp_path))
    data.setup("test")
    assert data.decode(read(data.test_dataloader())) == "abba"


def test_king_james():
    data = TextDataModule()
    assert isinstance(data.source, KingJames)
    data.setup("fit")
    assert data.num_classes == 68
    counts = [data.class_counts(split) for split in ("train", "valid", "test")]
    assert [int(count.sum()) for count in counts] == [3_763_711, 209_095, 209_096]
    assert [
        round(float(torch.special.entr(count / count.sum()).sum() / np.log(2)), 3)
        for count in counts
    ] == [4.373, 4.362, 4.321]


def test_a_batch_beyond_the_memory_is_refused_before_it_is_made(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 100, encoding="utf-8")
    source = LocalText(**dict.fromkeys(("train", "valid", "test"), str(tmp_path / "a.txt")))
    data = TextDataModule(source, length=64, batch_size=10**12)
    with pytest.raises(UserError, match=r"a batch of 1,000,000,000,000 rows .* takes at least"):
        data.setup("fit")


@pytest.mark.slow
def test_two_gigabytes_take_no_more_memory_than_two_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    block = "".join(chr(97 + n * n % 26) for n in range(1 << 21))
    with (tmp_path / "a.txt").open("w", encoding="utf-8") as file:
        for _ in range(1000):
            file.write(block)

    def resident():
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def started():
        begin = time.perf_counter()
        data = TextDataModule(LocalText(path=str(tmp_path / "a.txt")), 256, 64, streaming=True)
        data.setup("fit")
        return data, time.perf_counter() - begin

    data, first_start = started()
    batches = iter(data.train_dataloader())
    for _ in range(100):
        next(batches)
    before = resident()
    for _ in range(5000):
        next(batches)
    assert resident() < 1.05 * before
    # The second start reads no text, and a resume deep in the text begins as any other.
    again, second_start = started()
    assert second_start < first_start / 10
    stream = again.training_stream()
    begin = time.perf_counter()
    stream.read(stream.rows_per_epoch - 64, 64)
    assert time.perf_counter() - begin < first_start / 10
    assert resident() < 1.05 * before
