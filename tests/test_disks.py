"""A disk that is full or a folder that is gone ends a run in one line, and spoils nothing."""

import os
import subprocess
from contextlib import contextmanager

import pytest
import torch

from dflows.records import read_record
from tests.commands import everything_in, run_apart, run_here, small_config, write_text
from tests.disks import fill_for, fill_for_log

RUN = "runs/small/version_0"
FULL = "No space left on device: make room there"


def error_of(printed):
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed
    return line.removeprefix("error: ")


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return (
        "--config",
        small_config(tmp_path, write_text(tmp_path)),
        "--trainer.limit_test_batches=1",
    )


@pytest.mark.parametrize(
    ("name", "times", "resumes"),
    [
        ("config.yaml", 1, False),
        pytest.param("tokenizer.json", 1, False, marks=pytest.mark.slow),
        pytest.param("best.ckpt", 2, True, marks=pytest.mark.slow),
        ("last.ckpt", 2, True),
        ("small-1.json", 1, True),
    ],
)
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(
    small, tmp_path, monkeypatch, capfd, name, times, resumes
):
    fill_for(monkeypatch, name, times)
    assert run_here("fit", *small) == 1
    line = error_of(capfd.readouterr().err)
    hint = f": --ckpt_path {RUN}/last.ckpt resumes it" if resumes else ""
    assert line == f"cannot write {tmp_path}/{RUN}/{name}: {FULL}{hint}"
    files = everything_in(tmp_path / "runs")
    assert not [file for file in files if file.endswith((".tmp", ".lock", "small-1.json"))]
    for file in (tmp_path / "runs").rglob("*.ckpt"):
        assert torch.load(file, weights_only=True)["global_step"] >= 3
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    more = ("--ckpt_path", f"{RUN}/last.ckpt") if resumes else ()
    assert run_here("fit", *small, *more) == 0
    runs = sorted((tmp_path / "runs/small").iterdir())
    assert read_record(runs[-1] / "small-1.json").metrics["steps"] == 6


def test_a_log_that_cannot_be_written_ends_the_run_in_one_line(small, monkeypatch, capfd):
    fill_for_log(monkeypatch, 4)
    log = ("--trainer.log_every_n_steps", 1, "--trainer.logger.flush_secs", 0)
    assert run_here("fit", *small, *log, "--trainer.logger.max_queue", 1) == 1
    assert error_of(capfd.readouterr().err).startswith("cannot write ")


def test_a_folder_that_vanishes_is_named(small, tmp_path, capfd):
    assert run_here("fit", *small, "--trainer.callbacks", "tests.callbacks.RemoveFolder") == 1
    line = error_of(capfd.readouterr().err)
    assert line.startswith(
        f"the folder {tmp_path}/{RUN} is gone, and with it what the run has kept"
    )
    assert not (tmp_path / RUN).exists()


@contextmanager
def disk(folder, size):
    """A disk of so many bytes, where we may have one."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(options, check=False, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 8, 16, 40, 60, 80, 100, 120, 140, 160, 200])
def test_a_disk_that_is_full(tmp_path, room):
    config = small_config(tmp_path, write_text(tmp_path), max_steps=40, val_check_interval=4)
    small = ("--config", config, "--trainer.limit_test_batches=1", "--trainer.log_every_n_steps=1")
    place = tmp_path / "disk"
    small += ("--trainer.logger.save_dir", place / "runs")
    with disk(place, "600k"):
        (place / "filler").write_bytes(bytes((600 - room) << 10))
        done = run_apart("fit", *small, cwd=tmp_path)
        assert done.returncode == 1
        assert FULL in error_of(done.stderr)
        assert not list(place.rglob("*.tmp"))
        (place / "filler").unlink()
        last = place / RUN / "last.ckpt"
        more = ("--ckpt_path", last) if last.is_file() else ()
        done = run_apart("fit", *small, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (record,) = place.rglob("small-1.json")
        assert read_record(record).metrics["steps"] == 40


@pytest.mark.slow
def test_a_disk_that_can_be_read_alone(tmp_path):
    config = small_config(tmp_path, write_text(tmp_path))
    place = tmp_path / "disk"
    with disk(place, "2m"):
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        save_dir = ("--trainer.logger.save_dir", place / "runs")
        done = run_apart("fit", "--config", config, *save_dir, cwd=tmp_path)
        assert done.returncode == 1
        assert error_of(done.stderr) == (
            f"cannot write {place}/runs/small: Read-only file system: give a folder that can be "
            "written in"
        )
