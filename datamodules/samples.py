"""Independent samples, each to be had without the others, made many at a time."""

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from datamodules.chunks import Array
from datamodules.windows import TrainingStream

__all__ = ["Samples"]

BLOCK_SIZE = 4096


class Samples(TrainingStream):
    """An endless sequence of samples; memory is that of a block of them.

    Args:
        length: The length of a sample.
    """

    @abstractmethod
    def block(self, numbers: NDArray[np.int64]) -> Array:
        """Returns the samples of the given numbers, shape (n, length)."""

    def read(self, first: int, rows: int) -> Array:
        begins = range(first, first + rows, BLOCK_SIZE)
        ends = [min(begin + BLOCK_SIZE, first + rows) for begin in begins]
        blocks = [self.block(np.arange(*limits)) for limits in zip(begins, ends, strict=True)]
        return np.concatenate(blocks)
