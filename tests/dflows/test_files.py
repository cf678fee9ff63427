"""A file is replaced whole or left as it was."""

import pytest

from dflows.files import atomic_write


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    file = tmp_path / "figure.svg"
    file.write_text("old")

    def fail():
        with atomic_write(file) as unfinished:
            assert (unfinished.parent, unfinished.suffix) == (tmp_path, ".tmp")
            unfinished.write_text("half")
            raise OSError("no space on the disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_written_replaces_the_file(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("old")
    with atomic_write(file) as unfinished:
        unfinished.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]
