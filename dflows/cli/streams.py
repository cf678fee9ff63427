"""Files and standard streams that commands read and write as bytes, and the bar."""

import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dflows.cli.summary import stdout_console
from dflows.errors import UserError
from dflows.files import atomic_write, named

__all__ = [
    "STANDARD",
    "SUFFIX",
    "byte_bar",
    "console_of",
    "opened",
    "output",
    "seekable",
    "size_of",
    "target_of",
    "write",
]

SUFFIX = ".dfl"
COLUMNS = 120
"""Of tables in a file."""

STANDARD = "-"
IN_MEMORY = 1 << 24


def size_of(path: str) -> int | None:
    """Returns the bytes of a file, where they are known."""
    try:
        return None if path == STANDARD else Path(path).expanduser().stat().st_size
    except OSError:
        return None


class _Source(io.RawIOBase):
    """Creates a file to read, whose errors say which it is."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path, self._file = path, file

    def seekable(self) -> bool:
        """Says whether it can be read twice."""
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Returns the place."""
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        """Reads.

        Raises:
            UserError: If it cannot be read.
        """
        try:
            return self._file.read(size)
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error.strerror}: give a file") from None


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Opens a file to read, or the standard input for `-`.

    Raises:
        UserError: If it cannot be read.
    """
    if path == STANDARD:
        yield cast("BinaryIO", _Source("the standard input", sys.stdin.buffer))
        return
    try:
        file = Path(path).expanduser().open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: give a file") from None
    with file:
        yield cast("BinaryIO", _Source(path, file))


@contextlib.contextmanager
def seekable(path: str) -> Iterator[BinaryIO]:
    """Opens a file as :func:`opened` does, or a copy where it cannot be read twice."""
    with opened(path) as file:
        if file.seekable():
            yield file
            return
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as copy:
            shutil.copyfileobj(file, copy)
            copy.seek(0)
            yield cast("BinaryIO", copy)


def target_of(given: str | None, source: str, named_after: Callable[[str], str]) -> str:
    """Returns where the output goes: where it is told, or beside the input.

    Args:
        given: The argument.
        source: The input.
        named_after: Returns the name of the output.

    Raises:
        UserError: If it would go to a terminal, or over another file that nobody named.
    """
    if given is not None or source == STANDARD:
        target = STANDARD if given is None else given
        if target == STANDARD and sys.stdout.isatty():
            raise UserError("the output would go to the terminal: give -o FILE")
        places = [Path(path).expanduser().resolve() for path in (target, source)]
        if places[0] == places[1] and STANDARD not in (target, source):
            raise UserError(f"{target} is the input and the output: give another -o")
        return target
    target = named_after(source)
    if Path(target).expanduser().exists():
        raise UserError(f"{target} is there already: give it by -o to replace it, or another")
    return target


@contextlib.contextmanager
def output(target: str) -> Iterator[BinaryIO]:
    """Opens a file to write and to read again, which gets its name when all is done.

    The standard output, `-`, gets its content then.

    Raises:
        UserError: If it cannot be written.
    """
    place = None if target == STANDARD else Path(target).expanduser().resolve()
    if place is None or (place.exists() and not place.is_file() and not place.is_dir()):
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as spool:
            yield cast("BinaryIO", spool)
            spool.seek(0)
            _pour(cast("BinaryIO", spool), place)
        return
    if place.is_dir() or not place.parent.is_dir():
        what = "is a folder" if place.is_dir() else "lies in no folder"
        raise UserError(f"{target} {what}: give a file")
    with atomic_write(place) as unfinished:
        try:
            file = unfinished.open("w+b")
        except OSError as error:
            raise named(place, error) from error
        with file:
            yield cast("BinaryIO", file)


def write(text: str, target: str | None) -> None:
    """Writes a text to a file, or to the standard output where none is given."""
    with output(STANDARD if target is None else target) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def console_of(target: str | None) -> Iterator[Console]:
    """Yields what prints tables: on the standard output, or into a file in so many columns."""
    if target in (None, STANDARD):
        yield stdout_console()
        return
    file = io.StringIO()
    yield Console(file=file, width=COLUMNS)
    write(file.getvalue(), target)


def _pour(source: BinaryIO, place: Path | None) -> None:
    """Copies a file to the standard output, or into what is there and no plain file."""
    if place is None:
        shutil.copyfileobj(source, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    try:
        with place.open("wb") as file:
            shutil.copyfileobj(source, file)
    except OSError as error:
        raise named(place, error) from error


@contextlib.contextmanager
def byte_bar(words: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows a bar on a terminal, and yields what tells it how many bytes are done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(words, total=total)
        yield lambda done: bar.update(task, completed=done)
