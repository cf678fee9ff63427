"""Rows of integers from an array: quantized images, genotypes, tables of numbered categories."""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from datamodules.chunks import Chunks, count
from datamodules.matrices import Matrix, Source, npz_names, open_matrix
from datamodules.module import StreamDataModule
from datamodules.splits import SPLITS, SplitRows, Splits
from datamodules.vocabulary import IntegerVocabulary
from datamodules.windows import RowsInOrder, ShuffledRows, TrainingStream
from dflows.errors import UserError
from dflows.reporting import Report, Score

__all__ = ["ArrayDataModule"]


class ArrayDataModule(StreamDataModule):
    """Creates the rows of an array (N, D) of integers 0..K-1, as batches of classes (B, D).

    An epoch of training visits every row of its split once, in an order that depends on `seed`, and
    on the number of the epoch, alone. Evaluation reads every row of a split once, in the order of
    the array. All values are looked at before training, block by block. A file `.npy` is read where
    it is needed, so that memory does not grow with it; a file `.npz` is packed, and so are arrays
    in column order: they are read into memory.

    Args:
        path: A file `.npy`, or `.npz`; `FILE.npz:NAME` is one array of several. In Python an array
            or a tensor, too. It is cut into splits as `splits` says. Where the splits are given, a
            mapping of `train`, `valid` and `test` to such arrays, or a file `.npz` that holds
            arrays of these names.
        batch_size: The rows of a training batch, in each process.
        eval_batch_size: The rows of an evaluation batch, in each process.
        splits: How the rows are shared out where the splits are not given.
        num_classes: The number of classes, K. By default the largest value of all splits and 1, at
            least 2.
        num_workers: The worker processes of each loader.
        seed: Every seed has a training stream of its own; the splits stay the same.

    Raises:
        UserError: If the array cannot be read, or holds anything but rows of integers from 0 on; if
            a split is missing or empty, or the splits differ in their columns; or if an argument is
            out of range. Values are looked at when they are first needed.

    Example:
        >>> pixels = np.arange(60).reshape(20, 3) % 17
        >>> data = ArrayDataModule(pixels, batch_size=4)
        >>> data.length, data.num_classes
        (3, 17)
        >>> next(iter(data.train_dataloader())).shape
        torch.Size([4, 3])
        >>> [batch.shape[0] for batch in data.test_dataloader()]
        [2]
    """

    def __init__(
        self,
        path: Source | dict[str, Source],
        batch_size: int = 64,
        eval_batch_size: int = 256,
        *,
        splits: Splits | None = None,
        num_classes: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self._parts = _parts(path, splits)
        columns = self._parts["train"][0].columns
        super().__init__(columns, batch_size, eval_batch_size, num_workers, seed)
        given = None if num_classes is None else IntegerVocabulary(num_classes)
        self._given_vocabulary = given
        self._counts: dict[str, Tensor] = {}

    @cached_property
    def vocabulary(self) -> IntegerVocabulary:
        """The integers 0..K-1; all values are looked at when it is first asked for."""
        given = self._given_vocabulary
        num_classes = None if given is None else given.num_classes
        # One array may be of all splits.
        arrays = {id(matrix): matrix for matrix, _ in self._parts.values()}
        largest = max(matrix.largest(num_classes) for matrix in arrays.values())
        return given or IntegerVocabulary(max(2, largest + 1))

    def setup(self, stage: str) -> None:
        """Looks at all values, so that a mistake shows before hours of training.

        Raises:
            UserError: If one is no class.
        """
        super().setup(stage)
        _ = self.vocabulary

    def class_counts(self, split: str = "train") -> Tensor:
        """Returns how often each class occurs in a split, over all columns.

        Args:
            split: "train", "valid" or "test".

        Returns:
            A LongTensor of shape (K,).
        """
        if split not in self._counts:
            counts = torch.zeros(self.num_classes, dtype=torch.int64)
            found = count(chunk.astype(np.int64) for chunk in self.evaluation_chunks(split))
            counts[: len(found)] = torch.from_numpy(found)
            self._counts[split] = counts
        return self._counts[split].clone()

    def rows(self, split: str = "train") -> int:
        """Returns how many rows a split has."""
        return len(self._parts[split][1])

    def report(self, score: Score) -> Report:
        report = super().report(score)
        return report.row(f"{score.split}, nats per row", f"{score.nats:.4f}")

    def check_length(self, length: int) -> None:
        """Refuses the columns of a checkpoint where they are others.

        Raises:
            UserError: If these rows have more or fewer.
        """
        if length != self.length:
            raise UserError(
                f"{self._parts['train'][0].name} has {self.length} columns, and the model of the "
                f"checkpoint {length}: give the array that it was trained on, or one of as many"
            )

    def training_stream(self) -> TrainingStream:
        """Returns the endless rows of the training split."""
        matrix, rows = self._parts["train"]
        return ShuffledRows(matrix.values, self.length, rows, self.seed)

    def evaluation_chunks(self, split: str) -> Chunks:
        """Returns the rows of a split in the order of the array, one after the other."""
        matrix, rows = self._parts[split]
        return RowsInOrder(matrix.values, self.length, rows)


def _parts(
    path: Source | dict[str, Source], splits: Splits | None
) -> dict[str, tuple[Matrix, SplitRows]]:
    """Returns the array that every split is in, and which of its rows are the split's."""
    if not isinstance(path, dict) and set(SPLITS) <= set(npz_names(path)):
        path = {split: f"{path}:{split}" for split in SPLITS}
    if not isinstance(path, dict):
        matrix = open_matrix(path)
        rows = (splits or Splits()).of(len(matrix), matrix.name)
        return {split: (matrix, rows[split]) for split in SPLITS}
    if splits is not None:
        raise UserError(
            "path gives the arrays of train, valid and test, and splits would cut one: leave "
            "splits away, or give one array"
        )
    if set(path) != set(SPLITS):
        raise UserError(
            f"path gives the arrays of {', '.join(map(str, path)) or 'no split'}: give one for "
            "each of train, valid and test, or one array alone"
        )
    given = {split: open_matrix(path[split]) for split in SPLITS}
    for split, matrix in given.items():
        if matrix.columns != given["train"].columns:
            raise UserError(
                f"the array of {split}, {matrix.name}, has {matrix.columns} columns, and that of "
                f"train, {given['train'].name}, has {given['train'].columns}: give all as many"
            )
    return {
        split: (matrix, SplitRows(0, len(matrix), len(matrix))) for split, matrix in given.items()
    }
