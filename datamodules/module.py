"""What all datamodules share: loaders for any number of processes and workers, and exact resume."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.chunks import Chunks
from datamodules.vocabulary import Vocabulary, parse_vocabulary
from datamodules.windows import EvaluationBatches, TrainingBatches, TrainingStream
from dflows.checks import check_above_entropy
from dflows.errors import UserError
from dflows.memory import check_memory
from dflows.metrics import entropy_in_bits
from dflows.reporting import Report, Score

__all__ = ["StreamDataModule", "check_examples"]

LARGEST_SEED = (1 << 63) - 1
MOST_WORKERS = 1024


def check_examples(number: int, row_length: int) -> None:
    """Refuses a number of evaluation examples that cannot be held.

    Args:
        number: The examples of a split.
        row_length: The numbers of one of them.

    Raises:
        UserError: If it is below 1, or they take more than the memory.
    """
    if number < 1:
        raise UserError(f"eval_examples must be at least 1, not {number}")
    # Beside the row itself, the number of an example and what it is drawn by.
    what = f"a split of {number:,} examples of {row_length:,} numbers"
    check_memory(8 * number * (row_length + 2), what, "give a smaller eval_examples")


@dataclass(frozen=True)
class _Place:
    """Creates a place of the training stream.

    Args:
        row: The row that comes next.
        batches: The batches before it, in all.
        of_epoch: Those of them that are of the epoch that goes on.
    """

    row: int = 0
    batches: int = 0
    of_epoch: int = 0


class StreamDataModule(pl.LightningDataModule, ABC):
    """A datamodule of an endless training stream and of evaluation splits read once.

    A batch is a LongTensor of classes, shape (B, D), or a pair of it and of what it is conditioned
    on: `batch_of` makes it of rows of `row_length` numbers. The training stream never ends. Its
    rows depend on the seed alone: with R processes of batch size B each, batch number n holds the
    R·B rows from n·R·B on, whatever the number of workers, and a run that is resumed from a
    checkpoint goes on with the row at which the checkpoint was written. Evaluation reads everything
    exactly once over all processes and workers; the rest that fills no window is a batch of shape
    (1, rest).

    With `trainer.max_steps` the stream is one epoch without end; to validate, set
    `val_check_interval`, and `check_val_every_n_epoch` to null. Where the trainer asks for epochs
    (`max_epochs`, or a fraction of one in `limit_train_batches` or `val_check_interval`), the
    loader has a length: an epoch is so many batches that their rows pass over the data once, the
    last filled up from the next pass, with which the next epoch goes on. Samples without end have
    no epoch, unless `limit_train_batches` says how many batches it has. `overfit_batches: N` begins
    every epoch with the first row, and so trains on N batches again and again.

    Args:
        length: The number of dimensions of a row, D.
        batch_size: The rows of a training batch in each process.
        eval_batch_size: The rows of an evaluation batch in each process.
        num_workers: The worker processes of each loader; 0 loads in the main process.
        seed: Every seed has a training stream of its own.

    Attributes:
        is_text: Whether evaluation rows, one after the other, are a text.
        stateful: Whether row i of a training batch begins where row i of the batch before ended.

    Raises:
        UserError: If an argument is out of range.
    """

    is_text = False
    stateful = False

    def __init__(
        self, length: int, batch_size: int, eval_batch_size: int, num_workers: int, seed: int
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("length", length, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")
        for name, value, most in (
            ("num_workers", num_workers, MOST_WORKERS),
            ("seed", seed, LARGEST_SEED),
        ):
            if value > most:
                raise UserError(f"{name} must be at most {most}, not {value}")
        self.length = length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._known = _Place()

    @classmethod
    def load_from_checkpoint(cls, *_: Any, **__: Any) -> Any:
        """Makes no data of a checkpoint.

        Lightning would import and call what the file names.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"a {cls.__name__} is made by its constructor, and the trainer reads its checkpoint: "
            "trainer.fit(module, datamodule=data, ckpt_path=path)"
        )

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The map of symbols and classes."""

    @abstractmethod
    def class_counts(self, split: str = "train") -> Tensor:
        """Returns how often each class occurs in a split, a LongTensor of shape (K,)."""

    @abstractmethod
    def training_stream(self) -> TrainingStream:
        """Returns the endless rows."""

    @abstractmethod
    def evaluation_chunks(self, split: str) -> Chunks:
        """Returns the classes of the split "valid" or "test", read in their order."""

    def training_chunks(self) -> Chunks | None:
        """Returns the classes of the training split in their order, where it is a text."""
        return None

    @property
    def entropy(self) -> float | None:
        """The exact entropy of an example in nats, given what it is conditioned on, where known."""
        return None

    def report(self, score: Score) -> Report:
        """Reports the unigram entropy of a split that was scored, and the entropy where known.

        Raises:
            CertificateError: If the score lies below the entropy by more than chance explains.
        """
        split = score.split
        unigram = float(entropy_in_bits(self.class_counts(split).unsqueeze(0)))
        name = "unigram_bpc" if split == "test" else f"{split}_unigram_bpc"
        report = Report({name: unigram})
        report.row(f"{split}, unigram entropy", f"{unigram:.4f}", "bits of a character alone")
        if self.entropy is None:
            return report
        report.metrics["entropy"] = self.entropy
        if split == "test":
            report.metrics["standard_error_nats"] = score.standard_error
        # What no example showed is in no deviation either: a share of 1/N of the distribution, over
        # all states at the most.
        states = self.length * math.log(self.num_classes)
        unseen = (math.log(score.examples) + states) / score.examples
        check_above_entropy(score.nats, self.entropy, math.hypot(score.standard_error, unseen))
        remark = f"{score.examples:,} examples; entropy {self.entropy:.3f}"
        return report.row(f"{split}, nats per example", f"{score.nats:.4f}", remark)

    def report_expected(self, model: Any, max_states: int) -> Report:
        """Reports the exact expected loss of a model, where the distribution is known; a hook.

        Args:
            model: A module with exact likelihoods, `log_prob`, without a context.
            max_states: Distributions of more states are not summed over.
        """
        return Report()

    def report_samples(self, samples: list[str]) -> Report:
        """Reports generated events, where they are text; a hook."""
        return Report()

    @property
    def row_length(self) -> int:
        """The numbers of a row: D, and those of what it is conditioned on."""
        return self.length

    @staticmethod
    def batch_of(rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the batch that rows of numbers (B, row_length) make."""
        return rows

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return self.vocabulary.num_classes

    def setup(self, stage: str) -> None:
        """Begins a fit with the first row, which a checkpoint that is loaded next may change.

        Raises:
            UserError: If the trainer is to overfit a part of an epoch, or a batch takes more than
                the memory.
        """
        if stage == "fit":
            check_memory(
                8 * self.batch_size * self.row_length,
                f"a batch of {self.batch_size:,} rows of {self.row_length:,} numbers",
                "give a smaller data.batch_size",
            )
            self._overfit_batches()
            self._known = _Place()
            # Both are wrong of these loaders, which know their workers and shuffle by number.
            for message in ("Your `IterableDataset` has `__len__`", "You requested to overfit but"):
                warnings.filterwarnings("ignore", message)

    def encode(self, text: str) -> Tensor:
        """Returns the classes of a text, a LongTensor of shape (symbols,).

        Raises:
            UserError: If the text has a symbol that the vocabulary has not.
        """
        return torch.from_numpy(self.vocabulary.encode(text).astype(np.int64))

    def decode(self, indices: Iterable[int]) -> str:
        """Returns the text of classes.

        Raises:
            UserError: If a class is not in 0..K-1.
        """
        return self.vocabulary.decode(indices)

    def save_vocabulary(self, folder: str | Path) -> Path:
        """Writes tokenizer.json into a folder and returns its path."""
        return self.vocabulary.save(folder)

    def training_batches(self, rows: int) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """Yields the first rows of the training stream, the same in every process.

        Args:
            rows: How many.
        """
        read = self.training_stream().read
        for first in range(0, rows, self.eval_batch_size):
            block = read(first, min(self.eval_batch_size, rows - first))
            yield self.batch_of(torch.from_numpy(block.astype(np.int64)))

    def train_dataloader(self) -> "DataLoader[Tensor]":
        """Returns the loader of this process's training batches.

        Raises:
            UserError: If the trainer asks for epochs of samples without end.
        """
        stream = self.training_stream()
        length = self._batches_per_epoch(stream)
        # Lightning does not always restart the iterator at an epoch: the batches must know.
        overfit = self._overfit_batches()
        cycle = min(overfit, length or overfit) if overfit else None
        batches = TrainingBatches(stream, self.batch_size, *self._process(), cycle)
        return _TrainingLoader(batches, self._first_row, length, **self._loader_options())

    def val_dataloader(self) -> "DataLoader[Tensor]":
        """Returns the loader of this process's batches of the split "valid"."""
        return self._evaluation_loader("valid")

    def test_dataloader(self) -> "DataLoader[Tensor]":
        """Returns the loader of this process's batches of the split "test"."""
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: a place of the training stream, and the vocabulary."""
        processes = self._process()[1]
        return {
            **asdict(self._place()),
            "processes": processes,
            "rows_of_batch": processes * self.batch_size,
            "vocabulary": self.vocabulary.to_json(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint was written.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            UserError: If the checkpoint's vocabulary is another one, or another number of processes
                would train on other rows at a time.
        """
        if self.trainer is not None and self.trainer.state.fn == "fit":
            _check_rows(self, self._process()[1], state_dict)
        self.check_vocabulary(
            parse_vocabulary(state_dict["vocabulary"], "the checkpoint's vocabulary")
        )
        self._known = _Place(**{key: int(state_dict[key]) for key in asdict(self._known)})

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Refuses the vocabulary of a checkpoint where it is another one.

        Args:
            vocabulary: The map of symbols and classes that a model was trained with.

        Raises:
            UserError: If these data have another, be it of equal size.
        """
        if vocabulary != self.vocabulary:
            raise UserError(
                f"the checkpoint was trained with another vocabulary ({vocabulary.num_classes} "
                f"symbols, here {self.num_classes}): set vocabulary to the tokenizer.json next to "
                "the checkpoint, or read the same text"
            )

    def check_length(self, length: int) -> None:
        """Refuses a model of another length, D, where that cannot be meant; a hook."""

    def _evaluation_loader(self, split: str) -> "DataLoader[Tensor]":
        batches = EvaluationBatches(
            self.evaluation_chunks(split), self.row_length, self.eval_batch_size, *self._process()
        )
        return DataLoader(batches, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": None,  # the data sets make whole batches
            "collate_fn": self.batch_of,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            # An iterator draws a seed for its workers; it must not disturb the global generator.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _process(self) -> tuple[int, int]:
        """Returns the number of this process, and how many there are."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _batches_per_epoch(self, stream: TrainingStream) -> int | None:
        """Returns the length of the training loader, or None where it is to have no end."""
        trainer = self.trainer
        if trainer is None:
            return None
        limit = trainer.limit_train_batches
        fractions = [
            value
            for value in (limit, trainer.val_check_interval)
            if isinstance(value, float) and value != 1
        ]
        if trainer.max_epochs in (None, -1) and not fractions:
            return None
        if stream.rows_per_epoch is not None:
            return -(-stream.rows_per_epoch // (self.batch_size * trainer.world_size))
        if isinstance(limit, int):
            return limit
        if trainer.max_steps != -1 and not fractions:
            return None
        raise UserError(
            f"a {type(self).__name__} has samples without end, and no epoch that the trainer could "
            f"count (max_epochs is {trainer.max_epochs}): set trainer.max_steps, or "
            "trainer.limit_train_batches to the batches of an epoch"
        )

    def _place(self) -> _Place:
        """Returns where in the training stream the trainer is, over all processes.

        It follows from the trainer's own count of processed batches, which a checkpoint holds too:
        what workers have fetched ahead is not counted.
        """
        trainer, known = self.trainer, self._known
        if trainer is None:
            return known
        progress = trainer.fit_loop.epoch_loop.batch_progress.state_dict()
        batches = progress["total"]["processed"]
        if batches < known.batches:
            return known  # the trainer has not taken up its count from a checkpoint yet
        row = known.row + (batches - known.batches) * self.batch_size * trainer.world_size
        begun = progress["total"]["ready"] > batches
        ended = progress["is_last_batch"] and not begun
        return _Place(row, batches, 0 if ended else progress["current"]["processed"])

    def _first_row(self) -> int:
        """Returns the row with which the training loader begins."""
        place = self._place()
        if self._overfit_batches():
            return place.of_epoch * self.batch_size * self._process()[1]
        return place.row

    def _overfit_batches(self) -> int:
        """Returns on how many batches alone the trainer is to train, or 0."""
        overfit = 0 if self.trainer is None else self.trainer.overfit_batches  # type: ignore[attr-defined]
        if overfit and isinstance(overfit, float):
            raise UserError(f"trainer.overfit_batches is {overfit}: give a whole number of batches")
        return int(overfit)


def _check_rows(data: StreamDataModule, processes: int, state_dict: dict[str, Any]) -> None:
    """Refuses other rows at a time than a checkpoint's, where nobody can have wanted them."""
    before, rows = (state_dict.get(key) for key in ("processes", "rows_of_batch"))
    given = processes * data.batch_size
    if rows is None or given == rows or (before == processes and not data.stateful):
        return
    remedy = f"set data.batch_size to {rows // processes}"
    if rows % processes:
        remedy = f"which {processes} processes cannot share equally: start {before}"
    raise UserError(
        f"data.batch_size is {data.batch_size} for each of {processes} processes, {given} rows at "
        f"a time, and the run that is resumed had {rows}, with {before}: {remedy}"
    )


class _TrainingLoader(DataLoader[Tensor]):
    """Creates a loader of which every iteration begins at the row that comes next.

    Args:
        dataset: The batches, without end.
        first_row: Tells with which row an iteration begins.
        length: The batches that the trainer takes to be an epoch.
        options: Those of a DataLoader.
    """

    def __init__(
        self,
        dataset: TrainingBatches,
        first_row: Callable[[], int],
        length: int | None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self._batches = dataset
        self._first_row = first_row
        self._length = length

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        # The row is asked for with the first batch: an iterator may be older than the checkpoint
        # that the trainer resumes from, where the length of an epoch is looked at before.
        self._batches.start_at(self._first_row())
        yield from super().__iter__()

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the training stream has no end")
        return self._length

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: that it is there tells Lightning that training can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: the datamodule keeps the row."""
