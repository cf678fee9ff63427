"""Ctrl-C while a command is being imported."""

import signal
import subprocess
import sys

import pytest

from dflows import starting
from tests.commands import command_line, environment

# Stops in the first import that takes time, as Ctrl-C may.
INTERRUPT = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


def run(line, folder, **more):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = subprocess.run(
        line, env=environment(**more), cwd=folder, capture_output=True, text=True, check=False
    )
    signal.signal(signal.SIGINT, before)
    return done


@pytest.mark.parametrize("command", ["fit", "evaluate", "generate"])
def test_a_command_that_is_interrupted_as_it_starts_says_so_in_one_line(tmp_path, command):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(INTERRUPT)
    done = run(command_line(command), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_who_imports_dflows_keeps_ctrl_c_as_it_is(tmp_path):
    script = (
        "import signal, dflows\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    done = run([sys.executable, "-c", script], tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_command_that_has_begun_is_interrupted_by_an_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "dflows.fit", "--config", "x.yaml"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    starting.interruptible()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    starting.started()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
