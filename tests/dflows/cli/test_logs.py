"""What a command tells: levels, a sign of life, and on what it runs."""

import re
import threading
import warnings
from types import SimpleNamespace

import pytest

from dflows.cli import logs
from dflows.cli.logs import (
    LOG,
    Heartbeat,
    describe_environment,
    in_words,
    is_first_process,
    set_log_level,
)
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


def beats():
    return [thread for thread in threading.enumerate() if thread.name == "dflows-heartbeat"]


def test_silence_is_broken_until_the_command_ends(monkeypatch):
    monkeypatch.setattr(logs, "MINUTE", 0.02)
    monkeypatch.setattr(logs.sys, "stdout", SimpleNamespace(isatty=lambda: False))
    said, thrice = [], threading.Event()

    def tell(*words):
        said.append(words)
        if len(said) == 3:
            thrice.set()

    monkeypatch.setattr(LOG, "info", tell)
    with Heartbeat() as heartbeat:
        heartbeat.start(0.001)
        assert thrice.wait(timeout=600)
        assert beats()
    assert {words[0] for words in said} == {"still running, %s after the last line"}
    assert not beats()


@pytest.mark.parametrize(("terminal", "every_seconds"), [(True, 30.0), (False, 0.0)])
def test_silence_is_kept_on_a_terminal_and_where_no_lines_are_wanted(
    terminal, every_seconds, monkeypatch
):
    monkeypatch.setattr(logs.sys, "stdout", SimpleNamespace(isatty=lambda: terminal))
    with Heartbeat() as heartbeat:
        heartbeat.start(every_seconds)
        assert not beats()


def test_the_first_process_of_the_first_node_tells(monkeypatch):
    assert is_first_process()
    monkeypatch.setenv("NODE_RANK", "1")
    assert not is_first_process()
    monkeypatch.delenv("NODE_RANK")
    monkeypatch.setattr(logs.rank_zero_only, "rank", 1)
    assert not is_first_process()


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
