"""Sequences in memory and in files are read alike."""

import gc
import pickle

import numpy as np
import pytest

from datamodules.values import FileValues, MemoryValues, cached_counts, store_values
from dflows.errors import UserError

VALUES = np.arange(300, dtype=np.int64) % 251


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "dflows"


@pytest.fixture(params=["memory", "file", "file for once"])
def values(request, cache):
    if request.param == "memory":
        return MemoryValues(VALUES)
    key = "text" if request.param == "file" else None
    return store_values([VALUES[:7], VALUES[7:]], np.uint8, key)


def test_windows_are_read_in_a_ring(values):
    begins = np.array([0, 299, 298, 17])
    expected = (begins[:, None] + np.arange(3)) % 300 % 251
    assert values.windows(begins, 3).tolist() == expected.tolist()
    assert values.windows(np.array([250]), 700)[0].tolist() == [
        *VALUES[250:],
        *VALUES,
        *VALUES,
        *VALUES[:50],
    ]
    assert values.windows(np.array([], int), 3).shape == (0, 3)


def test_chunks_are_the_whole(values):
    for _ in range(2):
        assert np.concatenate(list(values)).tolist() == VALUES.tolist()
    assert len(values) == 300


def test_other_processes_open_the_file_themselves(cache):
    values = store_values([VALUES], np.uint16, "text")
    again = pickle.loads(pickle.dumps(values))
    assert again.windows(np.array([5]), 9).tolist() == values.windows(np.array([5]), 9).tolist()


def test_numbers_in_the_middle_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"head" + VALUES.astype(">i2").tobytes() + b"tail")
    values = FileValues(tmp_path / "a", np.dtype(">i2"), offset=4, size=300)
    for found in (values, pickle.loads(pickle.dumps(values))):
        assert len(found) == 300
        assert np.concatenate(list(found)).tolist() == VALUES.tolist()
        assert found.windows(np.array([298]), 3).tolist() == [[*VALUES[298:], VALUES[0]]]


def test_a_key_is_written_once(cache):
    first = store_values([VALUES], np.uint8, "text", 3)
    second = store_values(iter(()), np.uint8, "text", 3)
    assert len(second) == len(first) == 300
    assert len(store_values([VALUES[:5]], np.uint8, "text", 4)) == 5


def test_what_nothing_tells_of_is_gone_with_the_values(cache):
    values = store_values([VALUES], np.uint8, None)
    assert len(list(cache.glob("values-*"))) == 1
    del values
    gc.collect()
    assert not list(cache.glob("values-*"))


def test_a_failure_leaves_no_file(cache):
    def chunks():
        yield VALUES
        raise UserError("the text ends in the middle")

    with pytest.raises(UserError, match="in the middle"):
        store_values(chunks(), np.uint8, "text")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert len(store_values([VALUES], np.uint8, "text")) == 300


def test_a_full_disk_is_named(cache, monkeypatch):
    class Full:
        def astype(self, _):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write the classes .*: No space left .* HF_HOME"):
        store_values([Full()], np.uint8, "text")


def test_a_folder_that_cannot_be_made_is_named(cache):
    cache.parent.joinpath("dflows").write_text("a file")
    with pytest.raises(UserError, match=r"cannot make the cache folder .*HF_HOME"):
        store_values([VALUES], np.uint8, "text")


def test_a_file_that_was_cut_is_no_data(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    values = FileValues(tmp_path / "a", np.uint8)
    (tmp_path / "a").write_bytes(bytes(5))
    with pytest.raises(UserError, match="is shorter than it was"):
        values.windows(np.array([4]), 4)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        FileValues(tmp_path / "none", np.uint8)


@pytest.mark.parametrize(("key", "calls"), [("text", 1), (None, 2)])
def test_counts_are_computed_once_for_a_key(cache, key, calls):
    made = []

    def counts():
        made.append(1)
        return np.array([3, 4])

    for _ in range(2):
        assert cached_counts(counts, key, 0).tolist() == [3, 4]
    assert len(made) == calls
