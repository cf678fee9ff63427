"""What a module learns of the data that it trains on: asked of them, else read in them."""

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Generator, Tensor
from torch.utils.data import DataLoader, IterableDataset

from dflows.errors import UserError

__all__ = ["Batch", "DataFacts", "DescribesData", "unpack"]

Batch: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Indices (B, D), or indices and what they are conditioned on (B, …)."""

MOST_VALUES = 1 << 20
"""Values that are read from a loader to count classes or n-grams."""


class DescribesData(Protocol):
    """What a datamodule may tell of its data.

    Every member is optional: a module asks :class:`DataFacts`, which finds out or does without.
    """

    num_classes: int
    """The number of classes, K."""
    length: int
    """The number of dimensions, D."""
    batch_size: int
    """The rows of a training batch of a process."""
    is_text: bool
    """Whether evaluation rows, one after the other, are a text."""
    stateful: bool
    """Whether row i of a training batch begins where row i of the batch before ended."""

    @property
    def entropy(self) -> float | None:
        """The exact entropy of an example in nats, given its context, where known."""

    def class_counts(self, split: str = "train") -> Tensor:
        """Returns how often each class occurs in a split, a LongTensor of shape (K,)."""

    def training_chunks(self) -> Iterable[Any] | None:
        """Returns the training split as consecutive pieces (d,) of one text, where it is a text."""

    def training_batches(self, rows: int) -> Iterator[Batch]:
        """Yields the first training rows, the same in every process."""


def unpack(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Returns the indices (B, D) of a batch as int64, and their context or None.

    Args:
        batch: A tensor of integers, or a tuple or list of one, or of one and its context.

    Raises:
        UserError: If the batch is anything else.

    Example:
        >>> unpack([torch.zeros(2, 3, dtype=torch.uint8)])
        (tensor([[0, 0, 0],
                [0, 0, 0]]), None)
    """
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, Tensor) for part in parts):
        raise UserError(
            f"a batch is {_described(batch)}: give a tensor of classes (B, D), or (classes,), or "
            "(classes, context), by the collate_fn of the DataLoader if need be"
        )
    y = parts[0]
    if y.is_floating_point() or y.is_complex():
        raise UserError(
            f"a batch holds {y.dtype} values, and classes are integers: convert them, "
            "by x.long() where they are whole numbers"
        )
    if y.ndim != 2:
        raise UserError(
            f"a batch of classes has the shape {tuple(y.shape)}: give (B, D), one row an example"
        )
    return y.long(), parts[1] if len(parts) > 1 else None


def _described(batch: Any) -> str:
    if isinstance(batch, dict):
        return f"a dict with the keys {', '.join(map(str, batch))}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch)}"
    return f"of type {type(batch).__name__}"


class DataFacts:
    """Creates what is known of the data that a trainer fits a module on.

    The datamodule is asked where it has the member of :class:`DescribesData`; any other data are
    looked at: one process reads the first training batches, by a loader of its own, and tells the
    others. Random states stay as they are. What can be iterated once only is not read.

    Args:
        trainer: The trainer, from the hook `setup` on.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._data = trainer.datamodule  # type: ignore[attr-defined]

    def _told(self, name: str, default: Any = None) -> Any:
        return getattr(self._data, name, default)

    @property
    def is_text(self) -> bool:
        """Whether evaluation rows are known to be a text, one after the other."""
        return bool(self._told("is_text", False))

    @property
    def batch_size(self) -> int | None:
        """The rows of a training batch of a process, where they are told."""
        size: int | None = self._told("batch_size")
        return size

    @property
    def length(self) -> int | None:
        """The number of dimensions, D, where it is told."""
        length: int | None = self._told("length")
        return length

    @property
    def stateful(self) -> bool:
        """Whether rows are known to continue those of the batch before."""
        return bool(self._told("stateful", False))

    @property
    def entropy(self) -> float | None:
        """The exact entropy of an example in nats, where known."""
        entropy: float | None = self._told("entropy")
        return entropy

    def class_counts(self, num_classes: int) -> Tensor | None:
        """Returns how often each class occurs in the training data, or in the first of them.

        All processes must ask at once.

        Args:
            num_classes: K of the model.

        Returns:
            A LongTensor of shape (K,), or None where the data can be iterated once only.

        Raises:
            UserError: If the data have another K, a class out of range, or no batch as it must be.
        """
        if callable(ask := self._told("class_counts")):
            counts: Tensor = ask()
            if len(counts) != num_classes:
                raise UserError(
                    f"the data have {len(counts)} classes and the model {num_classes}: "
                    "give both the same num_classes"
                )
            return counts
        batches = self._first_batches(MOST_VALUES)
        if batches is None:
            return None
        counts = torch.zeros(num_classes, dtype=torch.int64)
        for y, _ in batches:
            if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
                wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
                raise UserError(
                    f"the training data hold the class {wrong}, and the model has the classes 0 to "
                    f"{num_classes - 1}: set its num_classes, or renumber the data"
                )
            counts += y.flatten().bincount(minlength=num_classes)
        return counts

    def training_chunks(self) -> Iterable[Any] | None:
        """Returns the training text in consecutive pieces (d,), or None where it is no text."""
        ask = self._told("training_chunks")
        return ask() if callable(ask) else None

    def training_batches(self, rows: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields up to so many training rows, the first ones, unpacked and on the CPU.

        They are the same in all processes, which must ask at once.

        Raises:
            UserError: If the data can be iterated once only, or hold no batch as it must be.
        """
        if callable(ask := self._told("training_batches")):
            yield from map(unpack, ask(rows))
            return
        batches = self._first_batches(MOST_VALUES)
        if batches is None:
            raise UserError(
                "n-grams are counted on training data before training, and these can be iterated "
                "once only: give a DataLoader, or a data set that can be iterated again"
            )
        for y, context in batches:
            if rows <= 0:
                return
            yield y[:rows], None if context is None else context[:rows]
            rows -= len(y)

    def first_batch(self) -> tuple[Tensor, Tensor | None] | None:
        """Returns the first training batch, or None where the data can be iterated once only.

        Whether it has a context says whether the data are conditioned on something. All processes
        must ask at once.
        """
        if callable(self._told("training_batches")):
            return next(self.training_batches(self._told("batch_size", 1)), None)
        batches = self._first_batches(1)
        return batches[0] if batches else None

    def refuse_context(self, who: str) -> None:
        """Refuses data that are conditioned on something. All processes must ask at once.

        Args:
            who: The module that takes no context, with its article.

        Raises:
            UserError: If they are.
        """
        if (self.first_batch() or (None, None))[1] is not None:
            raise UserError(
                f"{who} takes no context, and the data are conditioned on one: choose a "
                "LanguageModel or a FlowModule whose flow has a Context"
            )

    def _first_batches(self, values: int) -> list[tuple[Tensor, Tensor | None]] | None:
        """Returns the first batches of up to so many values: at least one, at most an epoch."""
        found: list[tuple[Tensor, Tensor | None]] | str | None = None
        if self._trainer.is_global_zero:
            try:
                found = self._read(values)
            except UserError as error:
                found = str(error)
        # One process alone reads: shuffles and shards differ, and an error must reach them all.
        found = self._trainer.strategy.broadcast(found)
        if isinstance(found, str):
            raise UserError(found)
        return found

    def _read(self, values: int) -> list[tuple[Tensor, Tensor | None]] | None:
        with _kept_random_states():
            # Lightning makes its own loader only after the hook `setup`.
            loader = self._trainer.fit_loop._data_source.dataloader()
            if _is_exhausted_by_reading(loader):
                rank_zero_warn(
                    "The training data can be iterated once only: nothing is counted on them "
                    "before training. Give a DataLoader for a better start."
                )
                return None
            with _kept_generators(loader):
                return _first(_in_this_process(loader), values)


def _first(loader: Iterable[Any], values: int) -> list[tuple[Tensor, Tensor | None]]:
    found = []
    for batch in loader:
        y, context = unpack(batch)
        # A batch may be a view of memory that the next one overwrites.
        found.append((y.cpu().clone(), None if context is None else context.cpu().clone()))
        values -= y.numel()
        if values <= 0:
            break
    return found


def _is_exhausted_by_reading(loader: Any) -> bool:
    source = loader.dataset if isinstance(loader, DataLoader) else loader
    if isinstance(loader, DataLoader) and not isinstance(source, IterableDataset):
        return False
    return iter(source) is iter(source)


def _in_this_process(loader: Any) -> Any:
    """Returns a loader of the same batches that starts no workers, nor meets those of the other."""
    if not isinstance(loader, DataLoader):
        return loader
    alone = copy.copy(loader)
    alone.__dict__.update(
        num_workers=0, persistent_workers=False, prefetch_factor=None, timeout=0, _iterator=None
    )
    return alone


@contextmanager
def _kept_random_states() -> Iterator[None]:
    """Gives the global random generators back their states."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the users' own
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _kept_generators(loader: Any) -> Iterator[None]:
    """Gives a loader's own random generators back their states."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = [loader, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    generators = [generator for generator in found if isinstance(generator, Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
