"""Sequences of classes that windows are read from at any place: in memory, or in a file."""

import hashlib
import json
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from datamodules.chunks import Array, Chunks
from dflows.errors import UserError
from dflows.files import atomic_write

__all__ = ["FileValues", "MemoryValues", "Values", "cached_counts", "store_values"]

BLOCK = 1 << 20
"""Numbers of a file that are read at once."""


class Values(ABC):
    """A sequence of numbers, as a ring: behind its end stands its beginning.

    It is a :data:`~datamodules.chunks.Chunks`, too.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Array]: ...

    @abstractmethod
    def windows(self, begins: Array, length: int) -> Array:
        """Returns the windows that begin at places (n,), as an array (n, length)."""


class MemoryValues(Values):
    """Creates the values of an array in memory.

    Args:
        values: The array, of one dimension.

    Example:
        >>> MemoryValues(np.arange(4)).windows(np.array([0, 3]), length=2).tolist()
        [[0, 1], [3, 0]]
    """

    def __init__(self, values: Array) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Array]:
        yield self._values

    def windows(self, begins: Array, length: int) -> Array:
        size = len(self._values)
        if len(begins) and begins.max() + length > size:
            found: Array = self._values[(begins[:, None] + np.arange(length)) % size]
            return found
        return np.lib.stride_tricks.sliding_window_view(self._values, length)[begins]


class FileValues(Values):
    """Creates the values of a file, of which no more is in memory than is asked for.

    Args:
        path: The file; it may be removed while this is in use.
        dtype: The type of its numbers.
        offset: The bytes before them.
        size: How many there are; by default all to the end of the file.

    Raises:
        UserError: If it cannot be read.
    """

    def __init__(
        self,
        path: Path,
        dtype: type[np.integer] | np.dtype[np.integer],
        offset: int = 0,
        size: int | None = None,
    ) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._offset = offset
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        weakref.finalize(self, os.close, self._file)
        held = (os.fstat(self._file).st_size - offset) // self._dtype.itemsize
        self._size = held if size is None else size

    def __getstate__(self) -> tuple[Path, np.dtype[Any], int, int]:
        return self._path, self._dtype, self._offset, self._size

    def __setstate__(self, state: tuple[Path, np.dtype[Any], int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Array]:
        for begin in range(0, self._size, BLOCK):
            block = np.empty(min(BLOCK, self._size - begin), self._dtype)
            self._read(block, begin)
            yield block

    def windows(self, begins: Array, length: int) -> Array:
        found = np.empty((len(begins), length), self._dtype)
        for row, begin in zip(found, begins.tolist(), strict=True):
            first = min(length, self._size - begin)
            self._read(row[:first], begin)
            for done in range(first, length, self._size):
                self._read(row[done : done + self._size], 0)
        return found

    def _read(self, place: Array, begin: int) -> None:
        """Fills an array with the numbers from a place on."""
        # One call that names its place: processes share the file, and not where it is read.
        where = self._offset + begin * self._dtype.itemsize
        if os.preadv(self._file, [place.data], where) < place.nbytes:
            raise UserError(f"{self._path} is shorter than it was: begin again")


def _cache_folder() -> Path:
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "dflows"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {folder}: {error.strerror}: set the environment "
            "variable HF_HOME to a folder that can be written"
        ) from None
    return folder


def _name(*key: Any) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def store_values(chunks: Chunks, dtype: type[np.integer], *key: Any) -> FileValues:
    """Writes numbers to a file, or finds the one that was written before.

    Args:
        chunks: The numbers, read only if they are not in the cache yet.
        dtype: Their type in the file.
        key: What they depend on, in plain types. If the first is `None`, nothing tells whether a
            file is theirs, and it is gone with the values.

    Returns:
        The values. One process writes, and those that want the same wait for it.

    Raises:
        UserError: If the cache folder cannot be written.
    """
    folder = _cache_folder()
    if key[0] is None:
        temporary = tempfile.NamedTemporaryFile(dir=folder, prefix="values-", delete=False)  # noqa: SIM115
        path = Path(temporary.name)
        temporary.close()
        _write(chunks, dtype, path)
        values = FileValues(path, dtype)
        weakref.finalize(values, path.unlink, missing_ok=True)
        return values
    path = folder / f"{_name(*key, np.dtype(dtype).str)}.values"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            with atomic_write(path) as unfinished:
                _write(chunks, dtype, unfinished)
    return FileValues(path, dtype)


def _write(chunks: Chunks, dtype: type[np.integer], path: Path) -> None:
    try:
        with path.open("wb") as file:
            for chunk in chunks:
                chunk.astype(dtype).tofile(file)
    except OSError as error:
        raise UserError(
            f"cannot write the classes of the text to {path.parent}: "
            f"{error.strerror or error}: make room, or set the environment variable HF_HOME to "
            "another folder"
        ) from None


def cached_counts(counts: Any, *key: Any) -> Any:
    """Returns counts (n,), computed once for a key.

    Args:
        counts: Computes them.
        key: What they depend on, in plain types. If the first is `None`, they are computed anew.
    """
    if key[0] is None:
        return counts()
    path = _cache_folder() / f"{_name(*key)}.npy"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            found = counts()
            with atomic_write(path) as unfinished, unfinished.open("wb") as file:
                np.save(file, found)
        return np.load(path)
