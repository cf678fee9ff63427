"""What is counted on data and not trained."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["Counted"]


class Counted(nn.Module, ABC):
    """A part of a model that is counted on data, in one pass, and has nothing to train.

    Whoever runs the training finds such parts among the modules of a flow and counts them.
    """

    @property
    @abstractmethod
    def num_counted(self) -> int:
        """The classes that were counted; none before :meth:`count`."""

    @abstractmethod
    def count(self, chunks: Iterable[Any]) -> None:
        """Counts data anew, in one pass.

        Args:
            chunks: Tensors or arrays of classes: of shape (d,), consecutive pieces of one text,
                however it is cut; or (N, d), events, of which none goes on in another.

        Raises:
            UserError: If there are none, or other numbers than classes.
        """
