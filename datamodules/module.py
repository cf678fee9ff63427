"""What all datamodules share: loaders for any number of processes and workers, and exact resume."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
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
from dflows.metrics import entropy_in_bits
from dflows.reporting import Report, Score

__all__ = ["StreamDataModule"]


class StreamDataModule(pl.LightningDataModule, ABC):
    """Creates a datamodule of an endless training stream and of evaluation splits read once.

    A batch is a LongTensor of classes, shape (B, D), or a pair of it and of what it is conditioned
    on: `batch_of` makes it of rows of `row_length` numbers. The training stream never ends, so a
    trainer needs `max_steps` (and, to validate, `val_check_interval` with
    `check_val_every_n_epoch: null`). Its rows depend on the seed alone: with R processes of batch
    size B each, batch number n holds the R·B rows from n·R·B on, whatever the number of workers,
    and a run that is resumed from a checkpoint goes on with the row at which the checkpoint was
    written. Evaluation reads everything exactly once over all processes and workers; the rest that
    fills no window is a batch of shape (1, rest).

    Args:
        length: The number of dimensions of a row, D.
        batch_size: The rows of a training batch in each process.
        eval_batch_size: The rows of an evaluation batch in each process.
        num_workers: The worker processes of each loader; 0 loads in the main process.
        seed: Every seed has a training stream of its own.

    Attributes:
        is_text: Whether evaluation rows, one after the other, are a text.
        consecutive: Whether row i of a training batch begins where row i of the batch before ended.

    Raises:
        UserError: An argument is out of range.
    """

    is_text = False
    consecutive = False

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
        self.length = length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._first_row = 0
        self._resumed_at: int | None = None

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
        """Begins a fit with the first row, which a checkpoint that is loaded next may change."""
        if stage == "fit":
            self._first_row, self._resumed_at = 0, None

    def encode(self, text: str) -> Tensor:
        """Returns the classes of a text, a LongTensor of shape (symbols,).

        Raises:
            UserError: The text has a symbol that the vocabulary has not.
        """
        return torch.from_numpy(self.vocabulary.encode(text).astype(np.int64))

    def decode(self, indices: Iterable[int]) -> str:
        """Returns the text of classes.

        Raises:
            UserError: A class is not in 0..K-1.
        """
        return self.vocabulary.decode(indices)

    def save_vocabulary(self, folder: str | Path) -> Path:
        """Writes tokenizer.json into a folder and returns its path."""
        return self.vocabulary.save(folder)

    def train_dataloader(self) -> "DataLoader[Tensor]":
        """Returns the endless loader of this process's training batches."""
        batches = TrainingBatches(self.training_stream(), self.batch_size, *self._process())
        return _TrainingLoader(batches, self._row, **self._loader_options())

    def val_dataloader(self) -> "DataLoader[Tensor]":
        """Returns the loader of this process's batches of the split "valid"."""
        return self._evaluation_loader("valid")

    def test_dataloader(self) -> "DataLoader[Tensor]":
        """Returns the loader of this process's batches of the split "test"."""
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: the next training row and the text of tokenizer.json."""
        return {"row": self._row(), "vocabulary": self.vocabulary.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint was written.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            UserError: The checkpoint's vocabulary is another one.
        """
        self.check_vocabulary(
            parse_vocabulary(state_dict["vocabulary"], "the checkpoint's vocabulary")
        )
        self._resumed_at = int(state_dict["row"])

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
                f"symbols, here {self.num_classes}): set vocabulary to the tokenizer.json beside "
                "the checkpoint, or read the same text"
            )

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

    def _row(self) -> int:
        """Returns the training row that comes next, counted over all processes.

        It follows from the trainer's own count of processed batches, which a checkpoint holds too:
        what workers have fetched ahead is not counted.
        """
        processed = 0
        if self.trainer is not None:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()["total"]
            processed = progress["processed"] * self.batch_size * self.trainer.world_size
        if self._resumed_at is not None:
            self._first_row = self._resumed_at - processed
            self._resumed_at = None
        return self._first_row + processed


class _TrainingLoader(DataLoader[Tensor]):
    """Creates a loader of which every iteration begins at the row that comes next."""

    def __init__(
        self, dataset: TrainingBatches, next_row: Callable[[], int], **options: Any
    ) -> None:
        super().__init__(dataset, **options)
        self._batches = dataset
        self._next_row = next_row

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        self._batches.start_at(self._next_row())
        return super().__iter__()
