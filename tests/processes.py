"""Processes of tests, forked from one that has imported the libraries, which takes long."""

import os
import runpy
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from torch import multiprocessing

PATIENCE = 600

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["datasets", "jsonargparse", "pytorch_lightning", "torchmetrics"])


def as_torchrun(processes):
    """The variables that torchrun sets in each of several processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    every = {
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    return [{**every, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _join(processes):
    started = list(processes)
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def _become(module, arguments, cwd, variables, outputs):
    """What ``python -m module`` does, from the first line of the module on."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    for number, path in enumerate(outputs, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
    sys.argv = [module, *arguments]
    sys.path.insert(0, cwd)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_module(module, arguments, cwd, environments, folder):
    """Runs a module in a process for each of some environments, as one that has completed.

    The code is the first that is not 0; the outputs follow each other.
    """
    ranks = range(len(environments))
    printed, errors = ([folder / f"{name}-{rank}" for rank in ranks] for name in ("out", "err"))
    codes = _join(
        FORKS.Process(target=_become, args=(module, arguments, cwd, variables, outputs))
        for variables, *outputs in zip(environments, printed, errors, strict=True)
    )
    said = (
        "".join(file.read_text(encoding="utf-8") for file in part) for part in (printed, errors)
    )
    return subprocess.CompletedProcess(arguments, next(filter(None, codes), 0), *said)


def _run(function, variables, arguments, found):
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        result = {"value": function(*arguments)}
    except BaseException:  # noqa: BLE001 - it is shown where the test waits
        result = {"error": traceback.format_exc()}
    torch.save(result, found)
    os._exit(0)


def together(function, *arguments, folder, processes=2):
    """What a function returns in each of several processes, started as torchrun does."""
    paths = [Path(folder) / f"found-{rank}.pt" for rank in range(processes)]
    for stale in paths:
        stale.unlink(missing_ok=True)
    _join(
        FORKS.Process(target=_run, args=(function, variables, arguments, path))
        for variables, path in zip(as_torchrun(processes), paths, strict=True)
    )
    results = [torch.load(path) for path in paths]
    for found in results:
        assert "error" not in found, found["error"]
    return [found["value"] for found in results]
