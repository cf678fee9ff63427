"""The parts of a flow that are counted on training data, and not trained."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from dflows.counted import Counted
from dflows.errors import UserError
from dflows.experts import Expert, leave_one_out
from dflows.flow import DiscreteFlow
from lightning_modules.data import DataFacts

__all__ = ["Counting", "unseen_residual"]


def unseen_residual(flow: DiscreteFlow, y: Tensor, context: Tensor | None = None) -> Tensor:
    """Returns what the transforms leave of training data (N, d), as they would of unseen data."""
    with leave_one_out(counted=True):
        residuals = flow.residuals(y, context)
    return residuals[-1] if residuals else y


class Counting:
    """Creates what counts the n-grams of a flow.

    Those of an expert, and those of a base without transforms, are counted once, on the data. Those
    of a base under transforms are counted on what these leave of the data, again and again while
    the transforms learn. Whatever processes there are, all count the same.

    Args:
        flow: The flow.
        num_rows: Training rows that are counted where the data are no text, or transforms stand
            between.

    Raises:
        UserError: If there are no rows; if an expert is not of the data themselves; or if a counted
            base is that of transforms with a context.
    """

    def __init__(self, flow: DiscreteFlow, num_rows: int) -> None:
        if num_rows < 1:
            raise UserError(f"base_count_windows is {num_rows}: give at least 1")
        self._flow = flow
        self._num_rows = num_rows
        self._check()

    def _check(self) -> None:
        flow = self._flow
        *inner, outer = self._parts
        for part in inner:
            if any(_counted(module) for module in part.modules() if isinstance(module, Expert)):
                raise UserError(
                    f"n-grams are added to the logits of a {type(part).__name__} that transforms "
                    "stand on, and they are counted on the data: give them to the transform next "
                    "to the data, or to a base without transforms"
                )
        if outer is not flow.base and _counted(flow.base) and flow.takes_context:
            raise UserError(
                f"a {type(flow.base).__name__} counts classes and knows nothing of a context, and "
                "the transforms on it are given one: choose an AutoregressiveBase with a context, "
                "or a FactorizedBase, or leave the context away"
            )

    @property
    def _parts(self) -> list[nn.Module]:
        return [self._flow.base, *self._flow.transforms]

    def begin(self, data: DataFacts) -> int:
        """Counts all that was never counted: on the data first, for transforms depend on it.

        Args:
            data: The training data.

        Returns:
            The classes of the training data themselves that were counted.

        Raises:
            UserError: If an expert's data are no text.
        """
        number = 0
        for part in _counted(self._parts[-1]):
            if not part.num_counted:
                self._count_on_data(part, data)
                number += part.num_counted
        for part in self._on_residuals:
            if not part.num_counted:
                _count(part, self._residuals(data))
        return number

    def again(self, data: DataFacts) -> None:
        """Counts the base on what the transforms have come to leave."""
        for part in self._on_residuals:
            _count(part, self._residuals(data))

    @property
    def _on_residuals(self) -> list[Counted]:
        return _counted(self._flow.base) if len(self._flow.transforms) else []

    def _count_on_data(self, part: Counted, data: DataFacts) -> None:
        chunks = data.training_chunks()
        if chunks is None:
            experts = (module for module in self._flow.modules() if isinstance(module, Expert))
            if any(part in expert.modules() for expert in experts):
                # Training leaves each example out of the counts, so that all must be in them.
                raise UserError(
                    "a network is conditioned on n-grams, and the training data are no text to "
                    "count them on: leave ngram_order away, or train on a TextDataModule"
                )
            chunks = (y for y, _ in data.training_batches(self._num_rows))
        _count(part, chunks)

    def _residuals(self, data: DataFacts) -> Iterator[Tensor]:
        device = next((value.device for value in _tensors(self._flow)), None)
        for y, context in data.training_batches(self._num_rows):
            here = None if context is None else context.to(device)
            yield unseen_residual(self._flow, y.to(device), here)


def _counted(module: nn.Module) -> list[Counted]:
    return [part for part in module.modules() if isinstance(part, Counted)]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _count(part: Counted, chunks: Iterable[Any]) -> None:
    with torch.inference_mode(mode=False):
        part.count(chunks)
    rank_zero_info(f"{part}, counted on {part.num_counted:,} characters")
