"""Lines of progress where there is no terminal."""

import io
import re
from types import SimpleNamespace

import pytest
import torch

from dflows.cli import progress
from dflows.cli.progress import ProgressLines, in_words
from dflows.errors import UserError
from tests.training import trainer as make_trainer


class Clock:
    """A clock that every look at it advances."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def lines_of(tmp_path, monkeypatch, *, terminal=False, every_seconds=30.0, step=1.0, **options):
    from tests.lightning_modules.test_base import Unigram, batches

    monkeypatch.setattr(progress.sys, "stdout", SimpleNamespace(isatty=lambda: terminal))
    lines = ProgressLines(every_seconds)
    lines.clock, lines.output = Clock(step), io.StringIO()
    given = {"steps": 60, "val_check_interval": 20, **options}
    trainer = make_trainer(tmp_path, callbacks=[lines], **given)
    loader = torch.utils.data.DataLoader(batches(100), batch_size=None)
    trainer.fit(Unigram(), loader, torch.utils.data.DataLoader(batches(3), batch_size=None))
    return lines.output.getvalue().splitlines()


def test_a_line_has_step_bits_speed_and_the_time_left(tmp_path, monkeypatch):
    found = lines_of(tmp_path, monkeypatch)
    assert 2 <= len(found) <= 4
    pattern = (
        r"step \d+ of 60, train_bpc \d\.\d{4}(, valid_bpc \d\.\d{4})?, "
        r"[\d,]+ characters a second, (\d+ min )?\d+ s left"
    )
    training = [line for line in found if line.startswith("step")]
    assert training
    assert all(re.fullmatch(pattern, line) for line in training)
    assert all(line.isprintable() for line in found)


def test_a_line_comes_at_least_once_a_minute(tmp_path, monkeypatch):
    # The clock runs 7 seconds a batch, in training and in validation.
    found = lines_of(tmp_path, monkeypatch, step=7.0)
    assert len(found) >= 60 * 7 / 60


def test_the_time_left_falls_with_the_steps(tmp_path, monkeypatch):
    found = lines_of(tmp_path, monkeypatch, step=2.0, limit_val_batches=0)
    left = []
    for line in found:
        minutes, seconds = re.search(r"(?:(\d+) min )?(\d+) s left", line).groups()
        left.append(60 * int(minutes or 0) + int(seconds))
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 2


@pytest.mark.parametrize("options", [{"terminal": True}, {"every_seconds": 0.0}])
def test_no_lines_are_written_on_a_terminal_or_where_none_are_wanted(
    tmp_path, monkeypatch, options
):
    assert not lines_of(tmp_path, monkeypatch, **options)


def test_seconds_below_0_are_refused():
    with pytest.raises(UserError, match=r"progress_lines\.every_seconds is -1"):
        ProgressLines(-1)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (-3, "0 s")]
)
def test_durations_are_said_in_two_units(seconds, words):
    assert in_words(seconds) == words
