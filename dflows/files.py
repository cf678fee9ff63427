"""Files that are there whole or not at all, and errors that say which could not be written."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dflows.errors import UserError

__all__ = ["atomic_write", "make_folder", "named", "unwritable", "write_text"]

_CURES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or ask for more",
    errno.EROFS: "give a folder that can be written in",
    errno.EACCES: "give a folder that can be written in",
    errno.EPERM: "give a folder that can be written in",
    errno.ENOENT: "its folder is gone, put it back or give another",
    errno.ENOTDIR: "give a folder, and no file",
    errno.EEXIST: "give a folder, and no file",
    errno.EISDIR: "a folder has its name, remove that",
    errno.EMFILE: "raise the limit of open files, ulimit -n",
}
_OF_A_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def unwritable(error: OSError) -> bool:
    """Says whether an error can only be that of a file that could not be written."""
    return error.errno in _OF_A_FULL_DISK


def named(path: str | os.PathLike[str], error: OSError) -> UserError:
    """Returns the error of a file that could not be written: its path, the reason and the cure.

    Args:
        path: The file, or the folder that it was to be in.
        error: What the system said.

    Example:
        >>> named("runs/last.ckpt", OSError(errno.ENOSPC, "No space left on device"))
        UserError('cannot write runs/last.ckpt: No space left on device: make room there')
    """
    cure = _CURES.get(error.errno or 0, "mend that, or give another folder")
    return UserError(f"cannot write {path}: {error.strerror or error}: {cure}")


@contextmanager
def atomic_write(file: Path, unfinished: str = "") -> Iterator[Path]:
    """Writes a temporary file, and moves it into place when it is complete and on the disk.

    Args:
        file: The place, in a folder that exists.
        unfinished: The name of the temporary file; one that no other has, where it is not given.
            What a killed process left under a name that is given is written over.

    Yields:
        The path to write to, in the same folder. After an error it is gone, and what was at the
        place is still there.

    Raises:
        UserError: If it cannot be written; the message names the file and the cure.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "note.txt")
        ...     with atomic_write(file) as unfinished:
        ...         written = unfinished.write_text("whole")
        ...     file.read_text()
        'whole'
    """
    # Not with the file's own ending: what a killed process leaves must not be taken for a file.
    place = file.with_name(unfinished or f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield place
        _flush(place)
        place.replace(file)
        with suppress(OSError):  # there are systems that cannot do this with a folder
            _flush(file.parent)
    except OSError as error:
        raise named(file, error) from error
    finally:
        with suppress(OSError):
            place.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Writes a text as UTF-8, whole or not at all.

    Args:
        file: The place, in a folder that exists.
        text: The text, whose line ends are kept.

    Raises:
        UserError: If it cannot be written.
    """
    with atomic_write(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


def make_folder(folder: Path) -> None:
    """Makes a folder, and those that it is in, where they are missing.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise named(folder, error) from error
