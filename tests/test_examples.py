"""The examples, run as an outsider would: in a folder of their own."""

import shutil
import signal
import subprocess
import sys

import pytest
import torch

from dflows.records import read_record
from tests.commands import ROOT, environment, run_apart, small_config, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside") / "own_backbone"
    shutil.copytree(ROOT / "examples" / "own_backbone", folder)
    short = ("--trainer.max_steps", 20, "--trainer.val_check_interval", 10)
    done = run_apart("fit", "--config", "neighbours.yaml", *short, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test, bits per character" in done.stdout
    return folder


def test_a_foreign_class_is_imported_only_if_it_is_allowed(folder):
    checkpoint = ("--checkpoint", "runs/neighbours/version_0", "--num_samples", 1)
    done = run_apart("generate", *checkpoint, cwd=folder)
    assert done.returncode == 1
    assert "names the class neighbours.Neighbours" in done.stderr
    assert "add --allow neighbours" in done.stderr
    done = run_apart("generate", *checkpoint, "--allow", "neighbours", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 33


def test_the_readme_names_what_there_is(folder):
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "python -m dflows.fit --config neighbours.yaml" in readme
    assert "--allow neighbours" in readme


class Cluster:
    """Programs and variables of SLURM, of which a task of an array sees these."""

    def __init__(self, folder):
        self.folder, self.programs = folder, folder / "programs"
        self.programs.mkdir()
        for name, lines in {
            "srun": 'exec "$@"',
            "scontrol": f'echo "$@" >> {folder}/asked',
            "python": f'exec {sys.executable} "$@"',
        }.items():
            (self.programs / name).write_text(f"#!/bin/sh\n{lines}\n")
            (self.programs / name).chmod(0o755)

    def run(self, *arguments, **variables):
        job = {
            "SLURM_JOB_ID": "81",
            "SLURM_ARRAY_JOB_ID": "77",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_JOB_NAME": "dflows",
            "SLURM_NTASKS": "1",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_NNODES": "1",
            "SLURM_NODEID": "0",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "CONFIG": "small.yaml",
            **variables,
        }
        return subprocess.run(
            ["bash", ROOT / "examples" / "slurm" / "fit.sh", *map(str, arguments)],
            cwd=self.folder,
            env=environment(**job),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )


def test_the_job_script_is_requeued_and_goes_on_where_it_was(tmp_path):
    cluster = Cluster(tmp_path)
    small_config(tmp_path, write_text(tmp_path))
    send = {"number": int(signal.SIGUSR1), "step": 4, "hook": "on_after_backward"}
    more = [part for key, value in send.items() for part in (f"--trainer.callbacks.{key}", value)]
    more = ("--trainer.callbacks", "tests.callbacks.Send", *more)
    done = cluster.run(*more)
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    assert (tmp_path / "asked").read_text() == "requeue 77_3\n"
    run = tmp_path / "runs" / "small" / "version_0"
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 5
    done = cluster.run(*more, SLURM_RESTART_COUNT="1")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert read_record(run / "small-3.json").metrics["steps"] == 6
