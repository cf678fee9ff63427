"""What starts the processes of a run: torchrun's are joined, and what cannot work is refused."""

import pytest
import torch

from dflows.cli import launchers
from dflows.cli.launchers import PROCESSES_A_CORE, check_devices, launched
from dflows.cli.trainer import Trainer
from dflows.errors import UserError


@pytest.fixture
def torchrun(monkeypatch):
    """Makes the environment of a process that torchrun started."""

    def start(world, local):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
            monkeypatch.setenv(name, "0")

    return start


def test_without_a_launcher_all_is_as_given():
    for given in (("auto", 1), (2, 1), ([0, 1], 3)):
        assert launched(*given) == given


@pytest.mark.parametrize(
    ("world", "local", "given", "expected"),
    [
        (2, 2, ("auto", 1), (2, 1)),
        (8, 4, ("auto", 1), (4, 2)),
        (8, 4, ("4", 2), ("4", 2)),
        (8, 4, (4, 1), (4, 2)),
        (4, 2, ([1, 3], 2), ([1, 3], 2)),
        (2, 2, ("-1", 1), ("-1", 1)),
    ],
)
def test_what_torchrun_started_is_joined(torchrun, world, local, given, expected):
    torchrun(world, local)
    assert launched(*given) == expected


@pytest.mark.parametrize(
    ("tasks", "nodes", "given", "expected"),
    [
        (2, 1, ("auto", 1), (2, 1)),
        (8, 2, ("auto", 1), (4, 2)),
        (8, 2, ("auto", 2), (4, 2)),
        (8, 2, (4, 2), (4, 2)),
        (1, 1, ("auto", 1), ("auto", 1)),
    ],
)
def test_the_tasks_of_a_job_are_joined(monkeypatch, tasks, nodes, given, expected):
    monkeypatch.setenv("SLURM_NTASKS", str(tasks))
    monkeypatch.setenv("SLURM_NNODES", str(nodes))
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert launched(*given) == expected


@pytest.mark.parametrize(
    ("world", "local", "given", "message"),
    [
        (2, 2, (1, 1), r"trainer\.devices is 1 .* torchrun started 2 processes, 2 of them here"),
        (8, 4, ("auto", 3), r"trainer\.num_nodes 3, and torchrun started 8 processes, 4 of them"),
        (5, 2, ("auto", 1), "torchrun started 2 of 5 processes on this node"),
    ],
)
def test_other_numbers_than_torchrun_started_are_refused(torchrun, world, local, given, message):
    torchrun(world, local)
    with pytest.raises(UserError, match=message):
        launched(*given)


def test_a_trainer_is_of_all_processes_that_torchrun_started(torchrun):
    torchrun(4, 2)
    trainer = Trainer(accelerator="cpu", logger=False)
    assert (trainer.world_size, trainer.num_nodes) == (4, 2)


@pytest.mark.parametrize("devices", [99, "99", 10**12])
def test_more_processes_than_cores_can_run_are_refused(devices, monkeypatch):
    monkeypatch.setattr(launchers, "_cores", lambda: 2)
    message = rf"trainer\.devices is {devices}, and there are 2 cores, .* give at most 2"
    with pytest.raises(UserError, match=message):
        Trainer(accelerator="cpu", devices=devices, logger=False)


def test_a_few_processes_may_share_a_core(monkeypatch):
    monkeypatch.setattr(launchers, "_cores", lambda: 1)
    check_devices(PROCESSES_A_CORE, "cpu")
    with pytest.raises(UserError, match="there is 1 core, "):
        check_devices(PROCESSES_A_CORE + 1, "cpu")


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_more_devices_than_there_are_gpus_are_refused(accelerator, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    check_devices(8, accelerator)
    with pytest.raises(UserError, match=r"trainer\.devices is 9, and there are 8 GPUs: give at"):
        check_devices(9, accelerator)


@pytest.mark.parametrize("devices", ["auto", "0,1", -1, "-1"])
def test_what_is_no_number_is_lightnings(devices):
    check_devices(devices, "cpu")


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_hand_nothing_back_are_refused(strategy):
    with pytest.raises(UserError, match=r"trainer\.strategy spawns or forks .* give ddp"):
        Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
