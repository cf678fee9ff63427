"""What is printed is never worth a run."""

import errno
import io
import os
import sys

import pytest

from dflows.cli.output import patient_output, plain_output
from dflows.errors import UserError
from dflows.records import read_record
from tests.commands import run_here, small_config, write_text


class Closed(io.StringIO):
    """A stream that nobody reads: at once, or when it is flushed."""

    def __init__(self, when):
        super().__init__()
        self.when = when

    def write(self, text):
        if self.when == "write":
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return super().write(text)

    def flush(self):
        if self.when == "flush":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("when", "reason"), [("write", "Broken pipe"), ("flush", "No space left on device")]
)
def test_a_run_whose_output_is_closed_goes_on_and_says_so_at_its_end(monkeypatch, when, reason):
    monkeypatch.setattr(sys, "stdout", Closed(when))
    done = []

    def run():
        with patient_output():
            for number in range(3):
                print(number, flush=True)
                done.append(number)

    with pytest.raises(UserError, match=rf"figures could not be printed \({reason}\): they are in"):
        run()
    assert done == [0, 1, 2]
    assert isinstance(sys.stdout, Closed)


def test_what_can_be_printed_is(capsys):
    with patient_output():
        print("figures")
        print("progress", file=sys.stderr)
        assert not sys.stdout.isatty()
    assert capsys.readouterr() == ("figures\n", "progress\n")


def test_characters_that_a_terminal_has_not_are_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    plain_output()
    print("Ça va", flush=True)
    assert raw.getvalue() == b"\\xc7a va\n"


@pytest.mark.parametrize("kind", ["closed", "ascii"])
def test_a_record_is_not_lost_over_what_is_printed(tmp_path, monkeypatch, capfd, kind):
    config = small_config(tmp_path, write_text(tmp_path))
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", Closed("write") if kind == "closed" else plain)
    code = run_here("fit", "--config", config, "--trainer.limit_test_batches", 1)
    assert code == (kind == "closed")
    assert ("could not be printed" in capfd.readouterr().err) == (kind == "closed")
    run = tmp_path / "runs" / "small" / "version_0"
    assert read_record(run / "small-1.json").metrics["steps"] == 6
    monkeypatch.setattr(sys, "stdout", Closed("write") if kind == "closed" else plain)
    code = run_here("evaluate", "--checkpoint", run, "--record", tmp_path / "records")
    assert code == (kind == "closed")
    assert read_record(tmp_path / "records" / "small-test-1.json").metrics["test_bpc"] > 0
