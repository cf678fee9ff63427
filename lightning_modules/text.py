"""Bits of a text without breaks, in addition to those of independent windows."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from dflows.flow import DiscreteFlow
from dflows.metrics import BitsPerCharacter
from dflows.reporting import Report
from dflows.representations import exactly
from lightning_modules.base import DEFAULT_OPTIMIZATION, Batch, Optimization, compute
from lightning_modules.flow import FlowModule

__all__ = ["Overlapping", "Score", "TextModule"]

Score: TypeAlias = Callable[[Tensor], Tensor]
"""Takes the next characters (n,) of a text and returns the log-likelihood (n,) of each."""


class Overlapping:
    """Creates what scores a text part by part, and keeps the end of what it has read.

    Args:
        log_prob: Takes a text (m,) and how many of its characters are known; returns the
            log-likelihoods of the others, each given what comes before it.
        most: Characters that are kept.
    """

    def __init__(self, log_prob: Callable[[Tensor, int], Tensor], most: int) -> None:
        self._log_prob = log_prob
        self._most = most
        self._before: Tensor | None = None

    def __call__(self, part: Tensor) -> Tensor:
        known = 0 if self._before is None else len(self._before)
        text = part if self._before is None else torch.cat([self._before, part])
        self._before = text[max(len(text) - self._most, 0) :]
        return self._log_prob(text, known)


class TextModule(FlowModule, ABC):
    """A flow that also scores the test split as one text, from its first character on.

    Where the data are a text, testing also logs `test_bpc_stateful`: bits per
    character of the same characters as one text without breaks, each counted once. It is found
    by one process alone.

    Args:
        flow: The flow.
        optimization: Settings of the optimizer.
        base_count_windows: As in :class:`lightning_modules.FlowModule`.
    """

    def __init__(
        self,
        flow: DiscreteFlow,
        optimization: Optimization = DEFAULT_OPTIMIZATION,
        base_count_windows: int = 4096,
    ) -> None:
        super().__init__(flow, optimization=optimization, base_count_windows=base_count_windows)
        self.stateful_bits = BitsPerCharacter()
        self._score: Score | None = None
        self.bpc_stateful: float | None = None

    @abstractmethod
    def text_score(self) -> Score | None:
        """Returns what scores a text from its beginning, if the model can."""

    def on_test_start(self) -> None:
        """Begins the text, if there is one."""
        text = self.data.is_text and self.trainer.world_size == 1
        self._score = self.text_score() if text else None

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the test metrics, and to those of the text without breaks."""
        super().test_step(batch, batch_idx, dataloader_idx)
        if self._score is not None:
            text = self.indices_of(batch).flatten()
            with exactly(text.device):
                self.stateful_bits.update(self._score(text), len(text))

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        super().on_test_epoch_end()
        if self._score is not None:
            bits = compute(self.stateful_bits)
            self.bpc_stateful = float(bits)
            self.log("test_bpc_stateful", bits.float())
            self.stateful_bits.reset()
            self._score = None

    def report(self, split: str) -> Report:
        report = super().report(split)
        if split == "test" and self.bpc_stateful is not None:
            report.metrics["test_bpc_stateful"] = self.bpc_stateful
            remark = "every window after those before it"
            report.row("test, stateful", f"{self.bpc_stateful:.4f}", remark)
        return report
