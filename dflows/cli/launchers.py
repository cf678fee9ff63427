"""What starts the processes of a run: the command itself, or a launcher around it."""

import os
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from dflows.errors import UserError

__all__ = ["PROCESSES_A_CORE", "check_devices", "check_launcher", "launched"]

PROCESSES_A_CORE = 4
"""Processes that share a core of the CPU at the most; each takes some hundred megabytes, too."""


def launched(devices: Any, num_nodes: int) -> tuple[Any, int]:
    """Returns the devices of a node and the nodes, where torchrun or srun started the processes.

    Lightning takes processes for one run only where it is told as many devices. Here it need not
    be: what is not given is what there is.

    Args:
        devices: `trainer.devices`; `auto` if it is not given.
        num_nodes: `trainer.num_nodes`; 1 if it is not given.

    Raises:
        UserError: If other numbers are given than were started.
    """
    if not TorchElasticEnvironment.detect():
        return _tasks(devices, num_nodes)
    all_processes, processes = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    nodes, rest = divmod(all_processes, processes)
    if rest:
        raise UserError(
            f"torchrun started {processes} of {all_processes} processes on this node: start the "
            "same number on every one"
        )
    number = _number(devices)
    if number not in (None, processes) or num_nodes not in (1, nodes):
        raise UserError(
            f"trainer.devices is {devices} and trainer.num_nodes {num_nodes}, and torchrun started "
            f"{all_processes} processes, {processes} of them here: leave both away"
        )
    return processes if devices == "auto" else devices, nodes


def _tasks(devices: Any, num_nodes: int) -> tuple[Any, int]:
    """Returns the devices of a node and the nodes of a job of SLURM, as far as none are given."""
    if not SLURMEnvironment.detect() or devices != "auto":
        return devices, num_nodes
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES") or 1)
    if tasks == 1 or num_nodes not in (1, nodes):
        return devices, num_nodes
    return tasks // nodes, nodes


def check_devices(devices: Any, accelerator: object) -> None:
    """Refuses more devices than there are, before a process is started for each.

    Args:
        devices: `trainer.devices`.
        accelerator: `trainer.accelerator`.

    Raises:
        UserError: If there are fewer; on a CPU, fewer cores than some processes each.
    """
    number = _number(devices)
    if number is None or accelerator not in ("auto", "cpu", "gpu", "cuda"):
        return
    found = torch.accelerator.current_accelerator(check_available=True)
    if accelerator == "cpu" or found is None:
        cores = _cores()
        if number > PROCESSES_A_CORE * cores:
            raise UserError(
                f"trainer.devices is {number}, and there {_are(cores, 'core')}, where "
                f"{PROCESSES_A_CORE * cores} processes run at the most, and {cores} at full speed: "
                f"give at most {cores}"
            )
    elif number > (there := torch.accelerator.device_count()):
        raise UserError(
            f"trainer.devices is {number}, and there {_are(there, 'GPU')}: give at most {there}"
        )


def _cores() -> int:
    """Returns the cores that this process may use, which may be fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not a system that tells
        return os.cpu_count() or 1


def check_launcher(trainer: pl.Trainer) -> None:
    """Refuses processes that keep what they found to themselves.

    Raises:
        UserError: If they were spawned or forked from a running program, such as a notebook.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UserError(
            "trainer.strategy spawns or forks its processes, which hand no figures back: give ddp, "
            "or trainer.devices 1; from a notebook, run the command in a shell"
        )


def _number(devices: Any) -> int | None:
    """Returns how many devices are wanted, where that is a number."""
    if isinstance(devices, list):
        return len(devices)
    try:
        number = int(devices)
    except ValueError:  # auto, or a list as text
        return None
    return None if number < 0 else number  # all that there are


def _are(number: int, thing: str) -> str:
    return f"is 1 {thing}" if number == 1 else f"are {number} {thing}s"
