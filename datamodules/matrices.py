"""Arrays of rows of integers, from files of NumPy or from memory, looked at block by block."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datamodules.chunks import Array, regroup
from datamodules.values import FileValues, MemoryValues, Values
from datamodules.windows import rows_at_once
from dflows.errors import UserError
from dflows.memory import check_memory

__all__ = ["Matrix", "Source", "npz_names", "open_matrix"]

Source: TypeAlias = str | Path | NDArray[Any] | Tensor
"""A file `.npy`; a file `.npz`, with the name of one of its arrays after a colon; or an array."""

MOST_CLASSES = 1 << 20
"""The most classes that are taken to be meant where their number is not given."""
NPY, NPZ = b"\x93NUMPY", b"PK\x03\x04"
MEMBER = ".npz:"
IN_MEMORY = "the array"


@dataclass(frozen=True)
class Matrix:
    """Creates an array of rows of integers.

    Args:
        name: What messages call it.
        values: Its numbers, row after row.
        columns: Its columns, D.
    """

    name: str
    values: Values
    columns: int

    def __len__(self) -> int:
        return len(self.values) // self.columns

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """Yields blocks of consecutive rows (n, D), each behind the number of its first."""
        first = 0
        for block in regroup(self.values, rows_at_once(self.columns) * self.columns):
            yield first, block.reshape(-1, self.columns)
            first += len(block) // self.columns

    def largest(self, num_classes: int | None = None) -> int:
        """Returns the largest value, having looked at all.

        Args:
            num_classes: K, where it is given.

        Raises:
            UserError: If a value is negative, or at least K; or so large that nobody can mean the
                number of classes that it asks for.
        """
        limit = MOST_CLASSES if num_classes is None else num_classes
        largest = 0
        for first, block in self.blocks():
            negative = block < 0
            if negative.any():
                why = "classes begin with 0: renumber them, missing values to a class of their own"
                raise self._refused(first, block, negative, why)
            most = int(block.max())
            if most >= limit:
                why = (
                    f"it asks for more than {MOST_CLASSES:,} classes: renumber the values from 0 "
                    "on, or give num_classes"
                    if num_classes is None
                    else f"num_classes is {num_classes}: the classes are 0 to {num_classes - 1}"
                )
                raise self._refused(first, block, block >= limit, why)
            largest = max(largest, most)
        return largest

    def _refused(self, first: int, block: Array, wrong: NDArray[np.bool_], why: str) -> UserError:
        row, column = np.argwhere(wrong)[0].tolist()
        return UserError(
            f"{self.name}, {_place((first + row, column))}, is {block[row, column]}, and {why}"
        )


def open_matrix(source: Source) -> Matrix:
    """Opens an array; a file `.npy` is read where it is needed, and never whole.

    Args:
        source: A file, or an array in memory.

    Raises:
        UserError: If the file cannot be read, or it is no array (N, D) of integers.

    Example:
        >>> matrix = open_matrix(np.array([[0, 2], [1, 0]]))
        >>> len(matrix), matrix.columns, matrix.largest()
        (2, 2, 2)
        >>> open_matrix(np.array([[0.0, 2.0]]))
        Traceback (most recent call last):
        ...
        dflows.errors.UserError: the array holds float64 values, all of them whole: convert them ...
    """
    if isinstance(source, str | Path):
        return _open_file(str(source))
    if isinstance(source, Tensor):
        array = source.detach().cpu()
        # bfloat16, say, is no type of NumPy.
        source = (array.float() if array.is_floating_point() else array).numpy()
    if not isinstance(source, np.ndarray):
        raise UserError(f"an array is a file of NumPy, an array or a tensor, not {source!r:.40}")
    return _in_memory(IN_MEMORY, source)


def npz_names(source: Source) -> list[str]:
    """Returns the names of the arrays in a file `.npz`; none of other sources, or of one array.

    Raises:
        UserError: If the file cannot be read.
    """
    if not isinstance(source, str | Path) or MEMBER in str(source):
        return []
    path = Path(source).expanduser()
    with _reading(str(source)):
        return _names(path) if _kind(path) == NPZ else []


def _in_memory(name: str, array: NDArray[Any]) -> Matrix:
    _check(name, array)
    return Matrix(name, MemoryValues(array.reshape(-1)), array.shape[1])


def _open_file(name: str) -> Matrix:
    file, _, member = name.partition(MEMBER)
    path = Path(f"{file}.npz" if member else file).expanduser()
    with _reading(name):
        kind = _kind(path)
        if kind == NPZ:
            return _open_npz(path, str(path) if not member else f"{file}.npz", member)
        if kind != NPY or member:
            what = "a file .npz of several arrays" if member else "a file of NumPy"
            raise UserError(f"{path} is not {what}: save it by np.save(path, array)")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        _check(name, array)
        if array.flags.c_contiguous:
            values = FileValues(path, array.dtype, array.offset, array.size)
            return Matrix(name, values, array.shape[1])
        check_memory(
            array.nbytes,
            f"{name}, an array that lies column by column,",
            "save it row by row, np.save(path, np.ascontiguousarray(array))",
        )
        return _in_memory(name, np.array(array, order="C"))


def _open_npz(path: Path, file: str, member: str) -> Matrix:
    names = _names(path)
    if not member and len(names) != 1:
        listed = ", ".join(names) or "none"
        raise UserError(
            f"{file} holds the arrays {listed}: name one, path: {file}:{(names or ['NAME'])[0]}"
        )
    member = member or names[0]
    if member not in names:
        raise UserError(f"{file} holds no array {member}: it has {', '.join(names) or 'none'}")
    name = f"{file}:{member}"
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo(f"{member}.npy").file_size
    check_memory(size, f"{name}, which is read whole,", "save it alone, by np.save(path, array)")
    with _reading(name), np.load(path, allow_pickle=False) as arrays:
        return _in_memory(name, arrays[member])


def _names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


def _kind(path: Path) -> bytes:
    """Returns what a file begins with, if that is how a file of NumPy begins."""
    with path.open("rb") as file:
        begin = file.read(len(NPY))
    return next((kind for kind in (NPY, NPZ) if begin.startswith(kind)), b"")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Says of what goes wrong in a file what its user can do."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot read {name}: {reason}: give the file where it is now") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        if "object" in reason.lower():
            raise UserError(
                f"{name} holds Python objects, which are never unpickled: "
                "save integers, np.save(path, array.astype('int64'))"
            ) from None
        raise UserError(f"{name} is cut off or damaged ({reason}): copy or save it again") from None


def _check(name: str, array: NDArray[Any]) -> None:
    """Refuses an array by its type and its shape."""
    kind = array.dtype.kind
    if kind == "b":
        raise UserError(
            f"{name} holds booleans: convert them to 0 and 1, np.save(path, array.astype('uint8'))"
        )
    if kind == "f":
        raise _floats(name, array)
    if kind not in "iu":
        raise UserError(
            f"{name} holds values of the type {array.dtype}: number their classes from 0 on, "
            "np.unique(array, return_inverse=True) say"
        )
    if not array.size:
        raise UserError(f"{name} is empty, its shape is {array.shape}: give rows of integers")
    if array.ndim != 2:
        rows = len(array) if array.ndim else 1
        raise UserError(
            f"{name} has the shape {array.shape}, and an array of rows has two dimensions: "
            f"reshape it, np.save(path, array.reshape({rows}, {array.size // rows}))"
        )


def _floats(name: str, array: NDArray[Any]) -> UserError:
    """Returns the refusal of an array of floats, having looked for one that is not whole."""
    rows = np.atleast_1d(array)
    step = rows_at_once(max(1, rows[:1].size))
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        broken = np.argwhere(~np.isfinite(block) | (block != np.rint(block)))
        if len(broken):
            row, *rest = broken[0].tolist()
            value = block[(row, *rest)]
            remedy = (
                "give missing values a class of their own"
                if np.isnan(value)
                else "put the values into bins, np.digitize(array, edges) say"
            )
            return UserError(
                f"{name} holds {array.dtype} values, and {_place((first + row, *rest))}, is "
                f"{value}: classes are integers, {remedy}"
            )
    return UserError(
        f"{name} holds {array.dtype} values, all of them whole: convert them to integers, "
        "np.save(path, array.astype('int64'))"
    )


def _place(index: tuple[int, ...]) -> str:
    """Returns what messages call the place of a value."""
    if len(index) == 2:
        return f"row {index[0]}, column {index[1]} (from 0)"
    return f"place {', '.join(map(str, index))} (from 0)"
