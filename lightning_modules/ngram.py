"""The opponent without a network: counted n-grams."""

from torch import Tensor

from dflows.bases import NGramBase
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from lightning_modules.text import Overlapping, Score, TextModule

__all__ = ["NGramModule"]


class NGramModule(TextModule):
    """Creates an n-gram model of windows, and counts it in one pass over the training split.

    Counting is all the training there is, so one step is enough: ``trainer.max_steps: 1``. A text
    without breaks is scored with the characters of the longest n-gram before each known.

    Args:
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
          (base): NGramBase(
            num_classes=27, length=16
            (ngrams): NGrams(num_classes=27, order=4, ngrams=0)
          )
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

    def prepare(self) -> None:
        self.data.refuse_context("an NGramModule")
        if self.trainer.world_size > 1:
            raise UserError(
                f"{self.trainer.world_size} processes would count the same, and an NGramModule has "
                "nothing else to train: set trainer.devices to 1"
            )
        super().prepare()

    def text_score(self) -> Score:
        def log_prob(text: Tensor, known: int) -> Tensor:
            return self.flow.base.log_prob(text.unsqueeze(0))[0, known:]

        return Overlapping(log_prob, self._seen)
