"""Records of exact computations, without a trainer."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dflows.cli.recording import without_machine
from dflows.provenance import describe_device
from dflows.records import Record, write_record

__all__ = ["described", "write_exact_record"]


def described(module: nn.Module) -> str:
    """Describes a module by its class and arguments, without its submodules.

    Example:
        >>> described(nn.Sequential(nn.Linear(2, 3))), described(nn.Linear(2, 3))
        ('Sequential()', 'Linear(in_features=2, out_features=3, bias=True)')
    """
    return f"{type(module).__name__}({module.extra_repr()})"


def write_exact_record(
    folder: Path,
    model: nn.Module,
    *,
    name: str,
    kind: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    begin: float,
    seed: int = 0,
) -> Path:
    """Writes the record of a computation in double precision on the CPU.

    Args:
        folder: The folder of the record.
        model: The model that was evaluated or found.
        name: Name of the record.
        kind: Kind of the record.
        config: What the values were computed from, in plain types.
        metrics: Values by the names of :data:`dflows.records.METRICS`.
        begin: When the computation began, by `time.perf_counter`.
        seed: The seed.

    Returns:
        The record's file.
    """
    record = Record(
        name=name,
        kind=kind,
        config=without_machine(config),
        seed=seed,
        device=describe_device(torch.device("cpu")),
        precision="64-true",
        seconds=time.perf_counter() - begin,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        metrics=metrics,
    )
    return write_record(folder, record)
