"""A file is replaced whole or left as it was, and one that cannot be written is named."""

import errno
import os

import pytest

from dflows.errors import UserError
from dflows.files import atomic_write, make_folder, named, unwritable, write_text


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    file = tmp_path / "figure.svg"
    file.write_text("old")

    def fail():
        with atomic_write(file) as unfinished:
            assert (unfinished.parent, unfinished.suffix) == (tmp_path, ".tmp")
            unfinished.write_text("half")
            raise OSError("no space on the disk")

    with pytest.raises(UserError, match=r"cannot write .*figure\.svg: no space on the disk: "):
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


def test_a_disk_that_fills_up_as_it_is_flushed_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    write_text(file, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"config\.yaml: No space left on device: make room there"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_name_that_is_given_is_written_over(tmp_path):
    (tmp_path / ".last.ckpt.tmp").write_text("of a process that was killed")
    with atomic_write(tmp_path / "last.ckpt", ".last.ckpt.tmp") as unfinished:
        unfinished.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("number", "cure", "of_a_disk"),
    [
        (errno.ENOSPC, "make room there", True),
        (errno.EDQUOT, "make room there, or ask for more", True),
        (errno.EROFS, "give a folder that can be written in", True),
        (errno.EACCES, "give a folder that can be written in", False),
        (errno.ENOENT, "its folder is gone, put it back or give another", False),
        (errno.ELOOP, "mend that, or give another folder", False),
    ],
)
def test_every_reason_has_a_cure(number, cure, of_a_disk):
    error = OSError(number, os.strerror(number))
    assert str(named("runs", error)) == f"cannot write runs: {os.strerror(number)}: {cure}"
    assert unwritable(error) == of_a_disk


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cannot write .*file/runs: Not a directory: give a folder"
    ):
        make_folder(tmp_path / "file" / "runs")
