"""The bits of one network in every number of passes that it was trained for."""

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from dflows.flow import DiscreteFlow
from dflows.metrics import BitsPerCharacter
from dflows.reporting import Report
from lightning_modules.base import compute
from lightning_modules.timing import measure_generation

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

    def update(self, flow: DiscreteFlow, y: Tensor, context: Tensor | None, own: Tensor) -> None:
        """Scores a batch in every number of passes.

        Args:
            flow: The flow.
            y: Indices (N, d).
            context: What it is conditioned on.
            own: Log-likelihoods (N,) in the passes that the flow has.
        """
        for passes, metric in zip(self.choices, self.metrics, strict=True):
            log_prob = own
            if passes != flow.passes:
                log_prob = flow.with_passes(passes).log_prob(y, context)
            metric.update(log_prob, y.numel())  # type: ignore[operator]

    def compute(self) -> None:
        """Computes the bits, on all processes together, and starts anew."""
        for passes, metric in zip(self.choices, self.metrics, strict=True):
            self.bpc[str(passes)] = float(compute(metric))  # type: ignore[arg-type]
            metric.reset()  # type: ignore[operator]

    def report_seconds(self, flow: DiscreteFlow, own: float) -> Report:
        """Times the generation of 1 sequence in every number of passes.

        Args:
            flow: The flow.
            own: Seconds in the passes that it has.
        """
        report = Report({"passes_seconds_1": {}})
        device = next(flow.parameters()).device
        for passes in self.choices:
            seconds = own
            if passes != flow.passes:
                draw = partial(flow.with_passes(passes).sample, (1,))
                seconds = measure_generation(draw, device)["median"]
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
