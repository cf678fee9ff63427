"""What the benchmarks share: what the device can do, memory, and records with their opponents."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from dflows.memory import most_held
from dflows.metrics import time_calls
from dflows.provenance import describe_device
from dflows.records import Record, write_record


def arguments(description: str) -> argparse.ArgumentParser:
    """Returns a parser of the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, in under a minute")
    parser.add_argument("--record", type=Path, default=None, help="folder for the records")
    return parser


def bandwidth(device: torch.device, size: int) -> float:
    """Measures how many bytes of memory are read in a second, by a sum."""
    values = torch.ones(size // 4, device=device)
    return size / min(time_calls(values.sum, repeats=10, device=device)[0])


def matrix_rate(device: torch.device, size: int) -> float:
    """Measures how many floating-point operations a square matrix product does in a second."""
    one, other = torch.randn(2, size, size, device=device)
    return 2 * size**3 / min(time_calls(lambda: one @ other, repeats=5, device=device)[0])


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Measures the most memory that tensors made in a function take at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as profiled:
        function()
    return most_held(profiled)


def write(
    folder: Path | None,
    name: str,
    config: dict[str, Any],
    metrics: dict[str, Any],
    *,
    device: torch.device,
    seed: int,
    parameters: int,
    begin: float,
) -> None:
    """Writes what was measured as a record, if a folder is given.

    Args:
        folder: Where to.
        name: Name of the record, to which that of the kind of device is added.
        config: What was measured; its `opponent` is the record that ratios are taken of, named
            likewise.
        metrics: What came of it.
        device: Where.
        seed: The seed.
        parameters: Of the model, or 0.
        begin: When the benchmark began, by `time.perf_counter`.
    """
    if folder is None:
        return
    if "opponent" in config:
        config = config | {"opponent": f"{config['opponent']}-{device.type}"}
    record = Record(
        name=f"{name}-{device.type}",
        kind="benchmark",
        config=config,
        seed=seed,
        device=describe_device(device),
        precision="32-true",
        seconds=time.perf_counter() - begin,
        parameters=parameters,
        metrics=metrics,
    )
    print(write_record(folder, record))
