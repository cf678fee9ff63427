"""The bits of one network in every number of passes that it was trained for."""

import math
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from dflows.flow import DiscreteFlow
from dflows.metrics import BitsPerCharacter, time_calls
from dflows.reporting import Report
from lightning_modules.base import compute

__all__ = ["PassesCurve"]


class PassesCurve(nn.Module):
    """Creates the metrics of several numbers of passes.

    Args:
        choices: The numbers.
    """

    def __init__(self, choices: Sequence[int]) -> None:
        super().__init__()
        self.choices = list(choices)
        self.metrics = nn.ModuleList(BitsPerCharacter() for _ in choices)
        self.bpc: dict[str, float] = {}

    def update(self, flow: DiscreteFlow, y: Tensor, context: Tensor | None) -> None:
        """Scores a batch in every number of passes."""
        for passes, metric in zip(self.choices, self.metrics, strict=True):
            log_prob = flow.with_passes(passes).log_prob(y, context)
            metric.update(log_prob, y.numel())  # type: ignore[operator]

    def compute(self) -> None:
        """Computes the bits, on all processes together, and starts anew."""
        for passes, metric in zip(self.choices, self.metrics, strict=True):
            self.bpc[str(passes)] = float(compute(metric))  # type: ignore[arg-type]
            metric.reset()  # type: ignore[operator]

    def report_seconds(self, flow: DiscreteFlow) -> Report:
        """Times the generation of 1 sequence in every number of passes."""
        report = Report({"passes_seconds_1": {}})
        device = next(flow.parameters()).device
        for passes in self.choices:
            sample = partial(flow.with_passes(passes).sample, (1,))
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                seconds = median(time_calls(sample, warmup=2, device=device)[0])
            report.metrics["passes_seconds_1"][str(passes)] = seconds
            report.row(f"generating 1 sequence in {passes} passes, seconds", f"{seconds:.4f}")
        return report

    def report(self) -> Report:
        """Reports the bits, where they have been computed."""
        report = Report()
        if self.bpc and all(map(math.isfinite, self.bpc.values())):
            report.metrics["passes_bpc"] = self.bpc
            for passes, bits in self.bpc.items():
                report.row(f"test, in {passes} passes", f"{bits:.4f}", "the same network")
        return report
