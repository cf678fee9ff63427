"""The opponent without a network: counted n-grams."""

import torch
from torch import Tensor

from dflows.bases import NGramBase
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.metrics import BitsPerCharacter
from lightning_modules.base import Batch, compute
from lightning_modules.flow import DiscreteFlowModule

__all__ = ["NGramModule"]


class NGramModule(DiscreteFlowModule):
    """Creates an n-gram model of windows, and counts it in one pass over the training split.

    Counting is all the training there is, so one step is enough: ``trainer.max_steps: 1``. Where
    the data are a text, testing logs `test_bpc_carried` as well: its bits per character where
    windows do not begin anew. It is found by one process alone.

    Arguments:
        num_classes: K; taken from the data where a command builds the module.
        length: D; likewise.
        order: As in :class:`dflows.bases.NGramBase`.
        discount: Likewise.
        count_windows: Draws that are counted of data whose training split has no end.

    Raises:
        UserError: If a number is out of range, the data are conditioned on something, or several
            processes train.

    Example:
        >>> NGramModule(27, 16, order=4).flow
        DiscreteFlow(
          (base): NGramBase(num_classes=27, length=16, order=4, grams=0)
          (transforms): ModuleList()
        )
    """

    def __init__(
        self,
        num_classes: int,
        length: int,
        *,
        order: int = 6,
        discount: float | None = None,
        count_windows: int = 65536,
    ) -> None:
        base = NGramBase(num_classes, length, order=order, discount=discount)
        super().__init__(DiscreteFlow(base), base_count_windows=count_windows)
        self._seen = order - 1
        self.carried = BitsPerCharacter()
        self._before: Tensor | None = None

    def prepare(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.row_length > data.length:
            raise UserError(
                "an NGramModule takes no context, and the data are conditioned on one: choose a "
                "LanguageModel or a FlowModule with context_features"
            )
        if self.trainer.world_size > 1:
            raise UserError(
                f"{self.trainer.world_size} processes would count the same, and an NGramModule has "
                "nothing else to train: set trainer.devices to 1"
            )
        super().prepare()

    def on_test_start(self) -> None:
        """Begins the text, if there is one."""
        text = self.trainer.datamodule.training_chunks() is not None  # type: ignore[attr-defined]
        if text and self.trainer.world_size == 1:
            self._before = torch.empty(0, dtype=torch.long, device=self.device)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the test metrics, and to those of the text without breaks."""
        super().test_step(batch, batch_idx)
        if self._before is not None:
            windows = self.indices_of(batch).flatten()
            text = torch.cat([self._before, windows])
            log_prob = self.flow.base.log_prob(text.unsqueeze(0))[0, len(self._before) :]
            self.carried.update(log_prob, len(windows))
            self._before = text[max(len(text) - self._seen, 0) :]

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        super().on_test_epoch_end()
        if self._before is not None:
            self.log("test_bpc_carried", compute(self.carried).float())
            self.carried.reset()
            self._before = None
