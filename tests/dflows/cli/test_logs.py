"""What a command tells: levels, a sign of life, and on what it runs."""

import re
import time
import warnings
from types import SimpleNamespace

import pytest

from dflows.cli import logs
from dflows.cli.logs import LOG, Heartbeat, describe_environment, in_words, set_log_level
from dflows.cli.trainer import Trainer

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.fixture(autouse=True)
def _usual_level():
    yield
    set_log_level("info")


@pytest.mark.parametrize(
    ("level", "told"),
    [
        ("debug", ["all", "progress", "doubts"]),
        ("info", ["progress", "doubts"]),
        ("warning", ["doubts"]),
        ("error", []),
    ],
)
def test_a_level_leaves_away_what_is_below_it(level, told, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_log_level(level)
        LOG.debug("all")
        LOG.info("progress")
        LOG.warning("doubts")
        warnings.warn("of a library", stacklevel=1)
    lines = capsys.readouterr().err.splitlines()
    assert [re.fullmatch(f"{TIME} (.*)", line)[1] for line in lines] == told
    assert len(caught) == (level != "error")


@pytest.fixture
def _impatient(monkeypatch):
    """Takes a moment for a minute, where the output is no terminal."""
    monkeypatch.setattr(logs, "MINUTE", 0.02)
    monkeypatch.setattr(logs.sys, "stdout", SimpleNamespace(isatty=lambda: False))


@pytest.mark.usefixtures("_impatient")
def test_silence_is_broken_until_the_command_ends(monkeypatch):
    said = []
    monkeypatch.setattr(LOG, "info", lambda *words: said.append(words))
    with Heartbeat() as heartbeat:
        heartbeat.start(0.001)
        deadline = time.monotonic() + 60
        while len(said) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert said[:3] == [("still running, %s after the last line", "0 s")] * 3
    before = len(said)
    time.sleep(0.1)
    assert len(said) == before


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("why", ["a terminal", "no lines", "another process", "another node"])
def test_silence_is_kept(why, monkeypatch):
    said = []
    monkeypatch.setattr(LOG, "info", lambda *words: said.append(words))
    if why == "a terminal":
        monkeypatch.setattr(logs.sys, "stdout", SimpleNamespace(isatty=lambda: True))
    elif why == "another process":
        monkeypatch.setattr(logs.rank_zero_only, "rank", 1)
    elif why == "another node":
        monkeypatch.setenv("NODE_RANK", "1")
    with Heartbeat() as heartbeat:
        heartbeat.start(0.0 if why == "no lines" else 0.001)
        time.sleep(0.2)
    assert not said


def test_an_environment_has_devices_hosts_precision_and_versions():
    line = describe_environment(Trainer(accelerator="cpu", logger=False))
    assert re.fullmatch(r".*, 1 thread; 32-true; python 3\..*, torch 2\..*", line)
    two = Trainer(accelerator="cpu", devices=2, num_nodes=2, precision="bf16-mixed", logger=False)
    line = describe_environment(two)
    assert line.startswith("4 x ")
    assert "; 4 processes on 2 hosts, DDPStrategy; bf16-mixed; " in line


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (-3, "0 s")]
)
def test_durations_are_said_in_two_units(seconds, words):
    assert in_words(seconds) == words
