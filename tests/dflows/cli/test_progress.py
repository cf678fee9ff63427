"""Lines of progress where there is no terminal."""

import re
from types import SimpleNamespace

import pytest
import torch

from dflows.cli import progress
from dflows.cli.progress import ProgressLines
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
    lines.clock, said = Clock(step), []
    monkeypatch.setattr(progress.LOG, "info", said.append)
    given = {"steps": 60, "val_check_interval": 20, **options}
    trainer = make_trainer(tmp_path, callbacks=[lines], **given)
    loader = torch.utils.data.DataLoader(batches(100), batch_size=None)
    trainer.fit(Unigram(), loader, torch.utils.data.DataLoader(batches(3), batch_size=None))
    return said


def test_a_line_has_step_bits_speed_and_the_time_left(tmp_path, monkeypatch):
    found = lines_of(tmp_path, monkeypatch)
    pattern = (
        r"step \d+ of 60, train_bpc \d\.\d{4}(, valid_bpc \d\.\d{4})?, "
        r"[\d,]+ characters a second, (\d+ min )?\d+ s left, learning rate 0\.\d+"
    )
    training = [line for line in found if line.startswith("step")]
    assert 2 <= len(training) <= 4
    assert all(re.fullmatch(pattern, line) for line in training)
    assert all(line.isprintable() for line in found)


def test_every_validation_has_a_line_when_it_is_done(tmp_path, monkeypatch):
    found = lines_of(tmp_path, monkeypatch, every_seconds=1e9)
    pattern = r"validation after step (\d+), valid_bpc \d\.\d{4}, in (\d+ min )?\d+ s"
    assert [re.fullmatch(pattern, line)[1] for line in found] == ["20", "40", "60"]


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
