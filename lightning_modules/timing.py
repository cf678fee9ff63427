"""How fast a module generates."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dflows.metrics import GenerationLatency
from dflows.reporting import Report

__all__ = ["measure_generation", "report_generation"]

BATCHES = (1, 32)
MOST_SECONDS = 5.0
"""Seconds of the calls that are timed, if one does not take longer."""


class Sampler(Protocol):
    """What generates."""

    @property
    def device(self) -> torch.device:
        """Where it generates."""

    def sample(self, num_samples: int, *, context: Tensor | None = None) -> Tensor:
        """Draws indices (num_samples, length)."""


def measure_generation(
    draw: Callable[[], Tensor], device: torch.device, repeats: int = 10
) -> dict[str, float]:
    """Times the generation of sequences, median and 95th percentile.

    Args:
        draw: Generates them.
        device: Where it does so.
        repeats: Calls that are timed; fewer where they take long.
    """
    latency = GenerationLatency().to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        latency.measure(draw, repeats=repeats, most_seconds=MOST_SECONDS)
    return {name: float(value) for name, value in latency.compute().items()}


def report_generation(
    module: Sampler, length: int, context: Tensor | None = None, repeats: int = 10
) -> Report:
    """Reports how long 1 sequence takes, and 32 at once.

    Args:
        module: The module.
        length: Dimensions of a sequence.
        context: One for each of 32 sequences, of a conditional module.
        repeats: Calls that are timed, at most.
    """
    report = Report({"generation_length": length})
    for number in BATCHES:
        given: dict[str, Any] = {} if context is None else {"context": context[:number]}
        draw = partial(module.sample, number, **given)
        timed = measure_generation(draw, module.device, repeats)
        key = f"generation_seconds_{number}"
        report.metrics |= {key: timed["median"], f"{key}_p95": timed["p95"]}
        if timed["peak_bytes"]:
            report.metrics[f"generation_bytes_{number}"] = int(timed["peak_bytes"])
        report.row(
            f"generating {number} sequence{'s' if number > 1 else ''}, seconds",
            f"{timed['median']:.4f}",
            f"median; 95th percentile {timed['p95']:.4f}; {length} characters each",
        )
    return report
