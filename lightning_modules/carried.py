"""Bits of a text without breaks, beside those of windows that each begin anew."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from dflows.flow import DiscreteFlow
from dflows.metrics import BitsPerCharacter
from dflows.reporting import Report
from lightning_modules.base import DEFAULT_OPTIMIZATION, Batch, Optimization, compute
from lightning_modules.flow import DiscreteFlowModule

__all__ = ["Carried", "CarriedModule", "Score"]

Score: TypeAlias = Callable[[Tensor], Tensor]
"""Takes the next characters (n,) of a text and returns the log-likelihood (n,) of each."""


class Carried:
    """Creates what scores a text part by part, and keeps the end of what it has read.

    Arguments:
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


class CarriedModule(DiscreteFlowModule, ABC):
    """Creates a flow that also scores the test split as one text, from its first character on.

    Where the data are a text, testing logs `test_bpc_carried` beside `test_bpc`: bits per character
    of the same characters where windows do not begin anew, each counted once. It is found by one
    process alone.

    Arguments:
        flow: The flow.
        optimization: Settings of the optimizer.
        base_count_windows: As in :class:`lightning_modules.DiscreteFlowModule`.
    """

    def __init__(
        self,
        flow: DiscreteFlow,
        optimization: Optimization = DEFAULT_OPTIMIZATION,
        base_count_windows: int = 4096,
    ) -> None:
        super().__init__(flow, optimization, base_count_windows=base_count_windows)
        self.carried = BitsPerCharacter()
        self._score: Score | None = None
        self.bpc_carried: float | None = None

    @abstractmethod
    def text_score(self) -> Score | None:
        """Returns what scores a text from its beginning, if the model can."""

    def on_test_start(self) -> None:
        """Begins the text, if there is one."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        text = data is not None and data.is_text and self.trainer.world_size == 1
        self._score = self.text_score() if text else None

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the test metrics, and to those of the text without breaks."""
        super().test_step(batch, batch_idx)
        if self._score is not None:
            text = self.indices_of(batch).flatten()
            self.carried.update(self._score(text), len(text))

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        super().on_test_epoch_end()
        if self._score is not None:
            bits = compute(self.carried)
            self.bpc_carried = float(bits)
            self.log("test_bpc_carried", bits.float())
            self.carried.reset()
            self._score = None

    def report(self, split: str) -> Report:
        report = super().report(split)
        if split == "test" and self.bpc_carried is not None:
            report.metrics["test_bpc_carried"] = self.bpc_carried
            remark = "every window after those before it"
            report.row("test, context carried", f"{self.bpc_carried:.4f}", remark)
        return report
