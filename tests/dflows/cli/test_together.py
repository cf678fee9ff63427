"""What processes do together; tests/experiments/test_drills.py lets them fail in all ways."""

import signal
from types import SimpleNamespace

import pytest
from torch import distributed

from dflows.cli import together
from dflows.cli.together import Together, _Launcher
from dflows.cli.trainer import Trainer
from dflows.errors import UserError


def two(**options):
    return Trainer(devices=2, strategy="ddp", accelerator="cpu", logger=False, **options)


def test_the_time_that_processes_wait_is_a_key():
    assert two(collective_timeout=90).strategy._timeout.total_seconds() == 90


@pytest.mark.parametrize("every", ["00:00:15:00", {"minutes": 5}])
def test_validations_by_the_clock_of_each_process_are_refused(every):
    with pytest.raises(UserError, match=r"val_check_interval is the time .*: give the batches"):
        two(val_check_interval=every)
    Trainer(devices=1, accelerator="cpu", logger=False, val_check_interval=every)


def test_a_process_that_ends_before_all_are_one_group_ends_the_first(monkeypatch):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(together.os, "_exit", end)
    launcher = _Launcher(two().strategy.cluster_environment, 2, 1)
    launcher.procs = [SimpleNamespace(poll=lambda: 1)]
    killed = []
    monkeypatch.setattr(launcher, "kill", killed.append)
    with pytest.raises(SystemExit, match="1"):
        launcher._until_joined()
    assert killed == [signal.SIGKILL]
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    launcher._until_joined()


@pytest.mark.parametrize("checking", [True, False])
def test_all_are_asked_at_the_end_of_every_validation(checking, monkeypatch):
    # A process that got a signal asks at its next batch, in the sanity check, too.
    asked = []
    callback = Together(SimpleNamespace(sanity_checking=checking, world_size=2))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(callback, "agree", lambda: asked.append(1))
    callback.on_validation_epoch_end()
    assert asked == [1]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("DataLoader timed out after 30 seconds"), False),
        (RuntimeError("database connection refused"), False),
        (ValueError("gloo"), False),
        (RuntimeError("[../third_party/gloo/pair.cc:534] Connection closed by peer"), True),
        (distributed.DistBackendError("NCCL communicator was aborted"), True),
        (distributed.DistNetworkError("The client socket has timed out"), True),
    ],
)
def test_only_what_the_group_says_means_that_a_process_is_gone(error, lost):
    assert together._is_of_the_group(error) is lost
