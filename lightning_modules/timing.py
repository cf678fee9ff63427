"""How fast a module generates."""

from typing import Any, Protocol

import torch
from torch import Tensor

from dflows.metrics import GenerationLatency, time_calls
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
    module: Sampler,
    num_samples: int,
    *,
    context: Tensor | None = None,
    repeats: int = 10,
) -> dict[str, float]:
    """Times the generation of so many sequences at once, median and 95th percentile.

    Args:
        module: The module.
        num_samples: Sequences of a call.
        context: One a sequence, of a conditional module.
        repeats: Calls that are timed; fewer where they take long.
    """
    given: dict[str, Any] = {} if context is None else {"context": context[:num_samples]}
    latency = GenerationLatency().to(module.device)

    def draw() -> Tensor:
        return module.sample(num_samples, **given)

    with (
        torch.random.fork_rng([module.device] if module.device.type == "cuda" else []),
        torch.no_grad(),
    ):
        (first,), _ = time_calls(draw, repeats=1, warmup=1, device=module.device)
        repeats = max(1, min(repeats, int(MOST_SECONDS / first)))
        latency.measure(draw, repeats=repeats, warmup=0)
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
        timed = measure_generation(module, number, context=context, repeats=repeats)
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
