"""A signal ends a run between two steps, and the run goes on exactly."""

import signal

import pytest
import torch

from dflows.cli.slurm import RequeueRequest
from dflows.cli.stopping import StopBetweenSteps
from dflows.errors import UserError
from tests.commands import everything_in, run_here, small_config, write_text


def send(number, step, hook):
    keys = {"number": int(number), "step": step, "hook": hook}
    given = [part for key, value in keys.items() for part in (f"--trainer.callbacks.{key}", value)]
    return ("--trainer.callbacks", "tests.callbacks.Send", *given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run_here("fit", "--config", small_config(folder, write_text(folder))) == 0
    return torch.load(folder / "runs/small/version_0/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("number", "step", "hook", "code", "said"),
    [
        (signal.SIGINT, 2, "on_after_backward", 130, "interrupted"),
        (signal.SIGINT, 3, "on_validation_batch_start", 130, "interrupted"),
        (signal.SIGINT, 6, "on_train_batch_end", 130, "interrupted"),
        (signal.SIGTERM, 4, "on_before_optimizer_step", 143, "terminated"),
        (signal.SIGTERM, 6, "on_validation_batch_start", 143, "terminated"),
    ],
)
def test_a_run_that_is_asked_to_end_saves_says_how_to_go_on_and_does_so_exactly(
    tmp_path, whole, monkeypatch, capfd, number, step, hook, code, said
):
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config, *send(number, step, hook)) == code
    last = "runs/small/version_0/last.ckpt"
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == f"error: {said}: --ckpt_path {last} resumes it"
    assert not [name for name in everything_in(tmp_path) if name.endswith((".tmp", "small-1.json"))]
    assert run_here("fit", "--config", config, "--ckpt_path", last) == 0
    resumed = torch.load(tmp_path / last, weights_only=True)["state_dict"]
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


def test_a_run_that_is_interrupted_before_it_trains_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path, write_text(tmp_path))
    before = everything_in(tmp_path)
    assert run_here("fit", "--config", config, *send(signal.SIGINT, 0, "on_fit_start")) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert everything_in(tmp_path) == before


class TestListening:
    def test_what_listened_before_listens_again(self):
        before = signal.getsignal(signal.SIGINT)
        with StopBetweenSteps().listening():
            assert signal.getsignal(signal.SIGINT) != before
        assert signal.getsignal(signal.SIGINT) is before

    def test_what_is_ignored_in_the_background_stays_ignored(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        with StopBetweenSteps().listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, before)

    def test_a_second_interruption_waits_for_no_step(self):
        stop = StopBetweenSteps()
        stop.on_train_start(None, None)
        with stop.listening():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # it is being saved

    def test_the_end_of_a_job_is_heard_in_a_job_alone(self, monkeypatch):
        before = signal.getsignal(signal.SIGUSR1)
        with StopBetweenSteps().listening():
            assert signal.getsignal(signal.SIGUSR1) is before
        monkeypatch.setenv("SLURM_NTASKS", "1")
        with StopBetweenSteps().listening(), pytest.raises(RequeueRequest):
            signal.raise_signal(signal.SIGUSR1)


def test_a_request_to_requeue_is_no_error_that_could_be_taken_for_one():
    assert not issubclass(RequeueRequest, (Exception, UserError))
