"""What training takes on several devices, by a formula: seconds of a step, and memory."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

__all__ = ["WEIGHT_BYTES", "Cost", "Strategy"]

Strategy: TypeAlias = Literal["auto", "ddp", "fsdp"]

WEIGHT_BYTES = 4
"""Of a weight, its gradient and each of Adam's two moments: 32 bits, under mixed precision too."""

_KEPT = 4  # weight, gradient, two moments

_TRAVELS = MappingProxyType({"auto": 0, "ddp": 2, "fsdp": 2})
"""How often the bytes of all weights pass a device's link in a step, but for its own share.

`ddp` sums gradients in a ring, there and back; `fsdp` gathers weights, and scatters gradients.
"""


@dataclass(frozen=True)
class Cost:
    """Creates the cost of a training step.

    Args:
        parameters: Trainable numbers of the model.
        step_seconds: Seconds that one device takes for its batch, alone.
        batch_bytes: Bytes that the backward pass of this batch needs.
        dimensions: Characters of the batch.
    """

    parameters: int
    step_seconds: float
    batch_bytes: int
    dimensions: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return WEIGHT_BYTES * self.parameters

    def seconds(self, devices: int, strategy: Strategy, link: float) -> float:
        """Returns the seconds of a step, if nothing is computed while gradients travel.

        Args:
            devices: How many there are, each with a batch of its own.
            strategy: How they share the work.
            link: Bytes a second that the slowest link of a device sends.

        Example:
            >>> Cost(250_000_000, 1.0, 0, 8192).seconds(2, "ddp", 10e9)
            1.1
        """
        share = (devices - 1) / devices
        return self.step_seconds + _TRAVELS[strategy] * share * self.weight_bytes / link

    def rate(self, devices: int, strategy: Strategy, link: float) -> float:
        """Returns the characters that all devices learn from in a second; likewise."""
        return devices * self.dimensions / self.seconds(devices, strategy, link)

    def bytes(self, devices: int, strategy: Strategy) -> int:
        """Returns the bytes of memory that a device needs.

        Those of weights, gradients and moments; with `ddp` a second copy of the gradients, to send;
        with `fsdp` a share of all, and in a step whole weights and gradients; and those of the
        batch.

        Args:
            devices: How many there are.
            strategy: How they share the work.

        Example:
            >>> cost = Cost(1_000_000_000, 1.0, 0, 8192)
            >>> cost.bytes(1, "auto"), cost.bytes(8, "ddp"), cost.bytes(8, "fsdp")
            (16000000000, 20000000000, 10000000000)
        """
        kept = _KEPT * self.weight_bytes
        if strategy == "fsdp":
            kept = kept // devices + 2 * self.weight_bytes
        elif strategy == "ddp":
            kept += self.weight_bytes
        return kept + self.batch_bytes
