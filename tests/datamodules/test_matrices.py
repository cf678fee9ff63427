"""Arrays of rows of integers: where they lie changes nothing, and what is none is refused."""

import io
import pickle
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from datamodules import windows
from datamodules.matrices import npz_names, open_matrix
from dflows.errors import UserError

ROWS = np.arange(60).reshape(20, 3) % 17


def saved(path, array, name="rows"):
    """Saves an array in the format that the ending of a path says."""
    if path.suffix == ".npz":
        np.savez_compressed(path, **{name: array})
    else:
        np.save(path, array)
    return path


def whole(matrix):
    return np.concatenate([block for _, block in matrix.blocks()])


class TestSources:
    @pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4", "int64", "uint64"])
    @pytest.mark.parametrize("ending", ["npy", "npz"])
    def test_files_of_all_types_of_integers_are_read(self, ending, dtype, tmp_path):
        matrix = open_matrix(saved(tmp_path / f"a.{ending}", ROWS.astype(dtype)))
        assert (len(matrix), matrix.columns, matrix.largest()) == (20, 3, 16)
        assert whole(matrix).tolist() == ROWS.tolist()

    @pytest.mark.parametrize(
        "source", [ROWS, np.asfortranarray(ROWS), ROWS[::-1, ::-1][::-1, ::-1], torch.tensor(ROWS)]
    )
    def test_so_are_arrays_and_tensors(self, source):
        assert whole(open_matrix(source)).tolist() == ROWS.tolist()

    def test_and_files_in_column_order(self, tmp_path):
        path = saved(tmp_path / "a.npy", np.asfortranarray(ROWS))
        assert whole(open_matrix(path)).tolist() == ROWS.tolist()

    def test_one_array_of_several_is_named(self, tmp_path):
        path = tmp_path / "a.npz"
        np.savez(path, images=ROWS, target=np.arange(20))
        assert npz_names(path) == ["images", "target"]
        assert npz_names(f"{path}:images") == []
        assert whole(open_matrix(f"{path}:images")).tolist() == ROWS.tolist()

    def test_what_stands_behind_the_array_is_not_read(self, tmp_path):
        with (tmp_path / "a.npy").open("wb") as file:
            np.save(file, ROWS)
            np.save(file, ROWS)
        assert whole(open_matrix(tmp_path / "a.npy")).tolist() == ROWS.tolist()

    def test_other_processes_open_the_file_themselves(self, tmp_path):
        matrix = open_matrix(saved(tmp_path / "a.npy", np.tile(ROWS, (1000, 1))))
        packed = pickle.dumps(matrix)
        assert len(packed) < 1000
        assert whole(pickle.loads(packed)).shape == (20_000, 3)

    def test_a_file_is_read_in_blocks(self, tmp_path, monkeypatch):
        path = saved(tmp_path / "a.npy", np.zeros((1 << 20, 32), "uint8"))
        tracemalloc.start()
        assert open_matrix(path).largest() == 0
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < path.stat().st_size / 4


REFUSED = {
    "float": (ROWS.astype(float), r"holds float64 values, all of them whole: .*astype\('int64'\)"),
    "half": (torch.tensor(ROWS).bfloat16(), "holds float32 values, all of them whole"),
    "fraction": (ROWS + 0.5, r"row 0, column 0 \(from 0\), is 0.5: classes are integers, .*bins"),
    "nan": (np.where(ROWS == 16, np.nan, ROWS), r"row 5, column 1 .* is nan: .* missing values"),
    "infinite": (np.where(ROWS == 16, np.inf, ROWS), r"row 5, column 1 \(from 0\), is inf"),
    "bool": (ROWS > 3, r"holds booleans: convert them to 0 and 1, .*astype\('uint8'\)"),
    "text": (ROWS.astype(str), r"values of the type <U\d+: number their classes from 0 on"),
    "complex": (ROWS * 1j, "values of the type complex128"),
    "vector": (np.arange(5), r"shape \(5,\), .* two dimensions: .*array.reshape\(5, 1\)"),
    "number": (np.array(5), r"shape \(\), .* two dimensions"),
    "images": (np.zeros((9, 8, 8), int), r"shape \(9, 8, 8\), .*array.reshape\(9, 64\)"),
    "no rows": (np.zeros((0, 3), int), r"is empty, its shape is \(0, 3\): give rows"),
    "no columns": (np.zeros((3, 0), int), r"is empty, its shape is \(3, 0\)"),
}


@pytest.mark.parametrize("where", ["memory", "npy", "npz"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_array_of_rows_is_refused(kind, where, tmp_path):
    source, message = REFUSED[kind]
    if where != "memory":
        array = source.float().numpy() if isinstance(source, torch.Tensor) else source
        source = saved(tmp_path / f"a.{where}", array)
    with pytest.raises(UserError, match=message) as error:
        open_matrix(source)
    name = {"memory": "the array", "npz": f"{source}:rows"}.get(where, str(source))
    assert str(error.value).startswith(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "value", "num_classes", "message"),
    [
        ((7, 2), -1, None, "row 7, column 2 (from 0), is -1, and classes begin with 0: renumber"),
        ((7, 2), 17, 17, "row 7, column 2 (from 0), is 17, and num_classes is 17: the classes are"),
        ((0, 0), 1700000000, None, "row 0, column 0 (from 0), is 1700000000, and it asks for more"),
        ((19, 1), 2**40, 30, "row 19, column 1 (from 0), is 1099511627776, and num_classes is 30"),
    ],
)
def test_a_value_that_is_no_class_is_named(place, value, num_classes, message, monkeypatch):
    monkeypatch.setattr(windows, "BLOCK", 12)
    changed = ROWS.copy()
    changed[place] = value
    with pytest.raises(UserError, match=re.escape(message)):
        open_matrix(changed).largest(num_classes)


class Opened:
    """What must not be unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def damaged(kind, folder):
    """Writes a file that cannot be read, and returns its path."""
    path = folder / ("a.npz" if "npz" in kind else "a.npy")
    if "objects" in kind:
        saved(path, np.array([[Opened()]]))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(ROWS))
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("1,2,3\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "npz without arrays":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "nothing")
    elif kind == "npz, damaged":
        content = bytearray(
            saved(path, np.random.default_rng(0).integers(9, size=(99, 99))).read_bytes()
        )
        content[500] ^= 255
        path.write_bytes(content)
    elif kind != "missing":
        content = saved(path, ROWS).read_bytes()
        path.write_bytes(content[: 20 if "header" in kind else -9])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "cannot read .*: No such file or directory: give the file where it is now"),
        ("folder", "cannot read .*: Is a directory"),
        ("empty", "is not a file of NumPy: save it by np.save"),
        ("text", "is not a file of NumPy"),
        ("pickle", "is not a file of NumPy"),
        ("objects", "holds Python objects, which are never unpickled"),
        ("npz of objects", "a.npz:rows holds Python objects, which are never unpickled"),
        ("cut off", r"is cut off or damaged \(.*\): copy or save it again"),
        ("cut off in the header", "is cut off or damaged"),
        ("npz, cut off", "is cut off or damaged"),
        ("npz, damaged", "is cut off or damaged"),
        ("npz without arrays", "holds the arrays none: name one"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(kind, message, tmp_path, capsys):
    with pytest.raises(UserError, match=message) as error:
        open_matrix(damaged(kind, tmp_path))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "unpickled" not in capsys.readouterr().out


class TestNames:
    def test_several_arrays_need_one(self, tmp_path):
        np.savez(tmp_path / "a.npz", images=ROWS, target=ROWS)
        with pytest.raises(
            UserError, match=r"holds the arrays images, target: name one, path: .*a.npz:images"
        ):
            open_matrix(tmp_path / "a.npz")

    def test_one_that_is_there(self, tmp_path):
        np.savez(tmp_path / "a.npz", images=ROWS)
        with pytest.raises(UserError, match="holds no array pixels: it has images"):
            open_matrix(f"{tmp_path / 'a.npz'}:pixels")

    def test_a_path(self):
        with pytest.raises(UserError, match=r"an array is a file .*, not \[\[1, 2\]\]"):
            open_matrix([[1, 2]])


@pytest.mark.parametrize(
    ("array", "ending", "message"),
    [
        (np.asfortranarray(ROWS), "npy", "lies column by column, takes at least .* save it row"),
        (ROWS, "npz", "read whole, takes at least .* save it alone"),
    ],
)
def test_what_has_to_be_in_memory_must_fit(array, ending, message, tmp_path, monkeypatch):
    path = saved(tmp_path / f"a.{ending}", array)
    monkeypatch.setattr("dflows.memory.total_memory", lambda _: 100)
    with pytest.raises(UserError, match=message):
        open_matrix(path)


def test_it_is_as_large_as_its_header_says(tmp_path):
    file = io.BytesIO()
    np.save(file, ROWS)
    (tmp_path / "a.npy").write_bytes(file.getvalue().replace(b"(20, 3)", b"(99, 3)"))
    with pytest.raises(UserError, match="is cut off or damaged"):
        open_matrix(tmp_path / "a.npy")
