"""Parts of a model that are counted on data instead of trained."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["Counted"]


class Counted(nn.Module, ABC):
    """A part of a model that is counted on data, in one pass, instead of trained.

    Whoever runs the training finds such parts among the modules of a flow and counts them.
    """

    @property
    @abstractmethod
    def num_counted(self) -> int:
        """The classes that were counted; none before :meth:`count`."""

    @abstractmethod
    def count(self, chunks: Iterable[Any]) -> None:
        """Counts data in one pass, in place of what was counted before.

        Args:
            chunks: Tensors or arrays of classes: of shape (d,), consecutive pieces of one text,
                however it is cut; or (N, d), independent events.

        Raises:
            UserError: If there is nothing to count, or a value is no class.
        """
