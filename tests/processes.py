"""Several processes in tests, which train together."""

import os
import socket
import traceback
from pathlib import Path

import torch
from torch import multiprocessing

PATIENCE = 600


def _run(function, rank, processes, port, folder, arguments):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    torch.set_num_threads(1)
    try:
        found = {"value": function(*arguments)}
    except BaseException:  # noqa: BLE001 - it is shown where the test waits
        found = {"error": traceback.format_exc()}
    torch.save(found, folder / f"found-{rank}.pt")
    os._exit(0)


def together(function, *arguments, folder, processes=2):
    """What a function returns in each of several processes, started as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for stale in Path(folder).glob("found-*.pt"):
        stale.unlink()
    context, folder = multiprocessing.get_context("spawn"), Path(folder)
    started = [
        context.Process(target=_run, args=(function, rank, processes, port, folder, arguments))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
    results = [torch.load(folder / f"found-{rank}.pt") for rank in range(processes)]
    for found in results:
        assert "error" not in found, found["error"]
    return [found["value"] for found in results]
