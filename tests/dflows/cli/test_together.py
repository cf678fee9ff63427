"""Two processes: whatever happens to one, or both, no process waits for another that is gone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.commands import command_line, environment, small_config, write_text

PATIENCE = 300
"""Seconds after which a drill counts as hanging: far more than it takes, on a busy machine too."""

HERE = str(Path(__file__).parent)
STEP, BATCH = 6, 3
VALIDATED = 4
CODES = {"raised": 1, "killed": 1, "terminated": 143, "interrupted": 130}
LINES = {
    "raised": "RuntimeError: the loader broke",
    "killed": "another process is gone",
    "terminated": "terminated: --ckpt_path runs/small/version_0/last.ckpt resumes it",
    "interrupted": "interrupted: --ckpt_path runs/small/version_0/last.ckpt resumes it",
}
DRILLS = [
    ("raised", 1, "train", "lightning"),
    ("terminated", 1, "train", "lightning"),
    ("interrupted", 1, "valid", "lightning"),
    *(
        pytest.param(what, rank, place, launcher, marks=pytest.mark.slow)
        for launcher in ("lightning", "torchrun")
        for what in CODES
        for rank in (0, 1, -1)
        for place in ("train", "valid", "setup")
        # A process that kills itself and others leaves nobody to tell.
        if (what, rank) != ("killed", -1) and (place != "setup" or what == "raised")
    ),
]


def launched(launcher, *arguments):
    if launcher == "lightning":
        return command_line("fit", *arguments)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*torchrun, "--standalone", "-m", "dflows.fit", *map(str, arguments)]


def ends(command, folder):
    """Runs a command to its end, and sees that it leaves no process behind."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(PYTHONPATH=f"{environment()['PYTHONPATH']}:{HERE}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=False)
            raise
    end = time.monotonic() + PATIENCE
    while left := running(process.pid):
        assert time.monotonic() < end, left
    return process.returncode, errors


def running(session):
    """The processes of a session that run; what has ended and waits to be noticed does not."""
    found = subprocess.run(
        ["ps", "-s", str(session), "-o", "stat=,args="],
        check=False,
        capture_output=True,
        text=True,
    ).stdout
    return [line for line in found.splitlines() if not line.startswith("Z")]


@pytest.mark.parametrize(("what", "rank", "place", "launcher"), DRILLS)
def test_all_end(what, rank, place, launcher, tmp_path):
    text = write_text(tmp_path)
    config = small_config(tmp_path, text, max_steps=100_000, val_check_interval=VALIDATED)
    number = {"setup": 0, "train": STEP, "valid": BATCH}[place]
    arguments = ["--config", config, "--trainer.devices", 2, "--trainer.strategy", "ddp"]
    arguments += ["--trainer.callbacks", "faults.Fault", "--trainer.callbacks.what", what]
    arguments += ["--trainer.callbacks.rank", rank, "--trainer.callbacks.place", place]
    arguments += ["--trainer.callbacks.number", number]
    code, errors = ends(launched(launcher, *arguments), tmp_path)
    if launcher == "torchrun":
        assert code  # its own, whatever that of the processes was
    elif (what, rank) == ("killed", 0):
        assert code == -9
    else:
        assert code == CODES[what]
    # One process says it, once.
    assert sum(line.startswith("error") for line in errors.splitlines()) == 1, errors
    assert LINES[what] in errors
    (last,) = [*tmp_path.glob("runs/small/version_0/last.ckpt")] or [None]
    saved = None if last is None else torch.load(last, weights_only=True)["global_step"]
    if what in ("terminated", "interrupted"):
        assert saved == {"train": STEP, "valid": VALIDATED}[place]
    else:
        # The one of the validation before: a process alone writes none.
        assert saved == (VALIDATED if place == "train" else None)


def test_the_time_that_processes_wait_is_a_key(tmp_path):
    from dflows.cli.trainer import Trainer

    trainer = Trainer(devices=2, strategy="ddp", accelerator="cpu", collective_timeout=90)
    assert trainer.strategy._timeout.total_seconds() == 90
