"""Jobs of SLURM, as far as its variables tell: a requeued one goes on in its run."""

import json
import os
import signal
import subprocess

import pytest
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

from dflows.cli import slurm
from dflows.cli.trainer import Trainer
from dflows.errors import UserError
from dflows.records import read_record
from tests.commands import command_line, environment, run_here, small_config, write_text

JOB = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job, with a `scontrol` that notes what it is asked for."""
    programs = tmp_path / "programs"
    programs.mkdir()
    scontrol = programs / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\n')
    scontrol.chmod(0o755)
    for name, value in {**JOB, "PATH": f"{programs}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return programs


def asked(job):
    file = job / "asked"
    return file.read_text().splitlines() if file.is_file() else []


def figures(run):
    metrics = read_record(run / "small-1.json").metrics
    return {name: metrics[name] for name in ("valid_bpc", "test_bpc", "steps", "characters")}


def test_no_command_leaves_requeueing_to_lightning(job):
    trainer = Trainer(accelerator="cpu", logger=False)
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


ONE = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": None}}
OTHER = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "small"}}


@pytest.mark.parametrize(
    ("hook", "logger"),
    [
        ("on_after_backward", ONE),
        ("on_validation_batch_start", OTHER),
        ("on_validation_batch_start", [ONE, {**OTHER, "init_args": {"save_dir": "logs"}}]),
    ],
)
def test_a_requeued_job_goes_on_in_its_run_as_if_nothing_had_been(
    tmp_path, job, monkeypatch, capfd, hook, logger
):
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config, "--name", "whole") == 0
    whole = tmp_path / "runs" / "whole" / "version_0"
    (whole / "whole-1.json").rename(whole / "small-1.json")

    more = ("--trainer.callbacks", "tests.callbacks.Send", "--trainer.callbacks.step", 3)
    more += ("--trainer.callbacks.number", int(signal.SIGUSR1), "--trainer.callbacks.hook", hook)
    command = ("fit", "--config", config, *more, "--trainer.logger", json.dumps(logger))
    capfd.readouterr()
    assert run_here(*command) == 128 + signal.SIGUSR1
    run = tmp_path / "runs" / "small" / "version_0"
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == (
        "error: the time of the job is up: job 4242 is requeued, and goes on in "
        "runs/small/version_0"
    )
    assert asked(job) == ["requeue 4242"]
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] in (3, 4)
    assert not list(tmp_path.rglob("hpc_ckpt_*"))

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_here(*command) == 0
    assert figures(run) == figures(whole)
    # The file of the other logger would be lost if it began another in the same folder.
    expected = ["version_0", "version_1"] if logger is OTHER else ["version_0"]
    assert sorted(path.name for path in run.parent.iterdir()) == expected
    content = [torch.load(one / "best.ckpt", weights_only=True) for one in (run, whole)]
    for name, weight in content[1]["state_dict"].items():
        assert torch.equal(content[0]["state_dict"][name], weight), name


@pytest.mark.slow
def test_the_tasks_of_a_job_end_after_the_same_step_and_one_requeues_it(tmp_path, job):
    config = small_config(tmp_path, write_text(tmp_path), max_steps=1000, val_check_interval=500)
    more = ("--trainer.callbacks", "tests.callbacks.Send", "--trainer.callbacks.step", 7)
    more += ("--trainer.callbacks.number", int(signal.SIGUSR1))
    more += ("--trainer.callbacks.hook", "on_after_backward")
    more += ("--trainer.devices", 2, "--trainer.strategy", "ddp")
    variables = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1"}
    tasks = [
        subprocess.Popen(
            command_line("fit", "--config", config, *more),
            env=environment(**variables, SLURM_PROCID=rank, SLURM_LOCALID=rank),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [task.communicate(timeout=600)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [128 + signal.SIGUSR1] * 2, said
    assert asked(job) == ["requeue 4242"]
    last = tmp_path / "runs" / "small" / "version_0" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] in (8, 9)


def test_a_job_that_was_requeued_before_its_first_checkpoint_begins_in_its_folder(
    tmp_path, job, monkeypatch
):
    config = small_config(tmp_path, write_text(tmp_path))
    run = tmp_path / "runs" / "small" / "version_3"
    run.mkdir(parents=True)
    slurm.note_job(run, ["--config", str(config)])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert run_here("fit", "--config", config) == 0
    assert [path.name for path in run.parent.iterdir()] == ["version_3"]
    assert figures(run)["steps"] == 6


def test_another_command_or_job_does_not_go_on_in_a_run(tmp_path, job, monkeypatch):
    for name, command in (("a", ["--seed", "1"]), ("b", ["--seed", "2"]), ("c", ["--seed", "2"])):
        (tmp_path / name).mkdir()
        slurm.note_job(tmp_path / name, command)
        os.utime(tmp_path / name / slurm.JOB, (ord(name), ord(name)))
    assert slurm.run_of_job(tmp_path, ["--seed", "2"]) is None, "it was not requeued"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert slurm.run_of_job(tmp_path, ["--seed", "2"]) == tmp_path / "c"
    assert slurm.run_of_job(tmp_path, ["--seed", "3"]) is None
    (tmp_path / "a" / slurm.JOB).write_text("{")
    assert slurm.run_of_job(tmp_path, ["--seed", "1"]) is None
    monkeypatch.setenv("SLURM_JOB_ID", "4243")
    assert slurm.run_of_job(tmp_path, ["--seed", "2"]) is None


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_a_checkpoint_that_lies_about_replaces_no_weights(tmp_path, job, capsys, command):
    config = small_config(tmp_path, write_text(tmp_path))
    (tmp_path / "hpc_ckpt_3.ckpt").write_bytes(b"of another run")
    assert run_here("fit", "--config", config) == 0
    run = tmp_path / "runs" / "small" / "version_0"
    if command == "evaluate":
        capsys.readouterr()
        assert run_here("evaluate", "--checkpoint", run) == 0
        assert f"{figures(run)['test_bpc']:.4f}" in capsys.readouterr().out


def test_a_task_of_an_array_is_requeued_alone(job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm.requeue() == "77_3"
    assert asked(job) == ["requeue 77_3"]


@pytest.mark.parametrize("kind", ["missing", "refused"])
def test_a_job_that_cannot_be_requeued_says_why(job, kind):
    if kind == "missing":
        (job / "scontrol").unlink()
    else:
        (job / "scontrol").write_text("#!/bin/sh\necho 'Job is not requeueable' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"job 4242 was not requeued \((Job is not|.*scontrol)"):
        slurm.requeue()


def test_tasks_that_lightning_does_not_support_are_refused(job, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(UserError, match="ntasks-per-node"):
        slurm.environment()
