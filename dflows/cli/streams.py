"""What the commands that encode and decode texts share: the model, files, and the bar."""

import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dflows.cli.checkpoints import Checkpoint, load_model
from dflows.codec import TextCodec
from dflows.codec.archive import ArchiveReader
from dflows.codec.flows import check_weights
from dflows.errors import UserError
from dflows.files import atomic_write, named
from dflows.flow import DiscreteFlow
from lightning_modules import BaseModule

__all__ = [
    "STANDARD",
    "SUFFIX",
    "byte_bar",
    "check_counts",
    "exact_flow",
    "find_device",
    "opened",
    "output",
    "resize",
    "seekable",
    "size_of",
    "target_of",
    "text_codec",
]

SUFFIX = ".dfl"
STANDARD = "-"
IN_MEMORY = 1 << 24


def find_device(name: str) -> torch.device:
    """Returns a device by its name; `auto` is the accelerator, where there is one.

    Raises:
        UserError: If it is not there.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} is not available: {error}") from None
    return device


def exact_flow(module: BaseModule) -> DiscreteFlow:
    """Returns the flow of a module, whose likelihood is exact.

    Raises:
        UserError: If there is none.
    """
    name = type(module).__name__
    if module.likelihood != "exact":
        raise UserError(
            f"the likelihood of a {name} is a {module.likelihood}, and nothing can be encoded in "
            "so many bits: give a checkpoint of an exact model"
        )
    flow = getattr(module, "flow", None)
    if not isinstance(flow, DiscreteFlow):
        raise UserError(f"a {name} has no flow, whose levels could be decoded: train a FlowModule")
    return flow


def text_codec(
    checkpoint: Checkpoint,
    *,
    allow: list[str],
    device: str,
    passes: int | None = None,
    window: int | None = None,
    archive: ArchiveReader | None = None,
) -> TextCodec:
    """Makes the model of a checkpoint, and what encodes and decodes with it.

    Args:
        checkpoint: The checkpoint.
        allow: Packages whose classes it may name.
        device: Where the model computes.
        passes: Passes of the model; its own, where not given.
        window: Symbols of a window, likewise.
        archive: What it is to decode, which says both.

    Raises:
        UserError: If the model cannot encode a text.
        ArchiveError: If it has not written the archive.
    """
    module = load_model(checkpoint, allow).to(find_device(device))
    flow = exact_flow(module)
    if archive is not None:
        check_weights(flow, archive)
        passes, window = archive.header.passes, archive.header.length
    resize(module, checkpoint, passes, window)
    return TextCodec(exact_flow(module), checkpoint.vocabulary.text_symbols())


def check_counts(config: Any, *keys: str) -> None:
    """Refuses numbers below 1 among the arguments of a command.

    Raises:
        UserError: If there is one; the message names its key.
    """
    for key in keys:
        if config[key] is not None and config[key] < 1:
            raise UserError(f"{key} is {config[key]}: give at least 1")


def resize(
    module: BaseModule, checkpoint: Checkpoint, passes: int | None, window: int | None
) -> None:
    """Sets the window of a model and then its passes, where they are asked for and others.

    Raises:
        UserError: If the model cannot have them.
    """
    if window not in (None, checkpoint.length):
        module.resize(length=window)
    if passes not in (None, module.passes):
        module.resize(passes=passes)


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
    """Opens a file as :func:`opened` does, or a copy of it, so that it can be read twice."""
    with opened(path) as file, tempfile.SpooledTemporaryFile(IN_MEMORY) as copy:
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
