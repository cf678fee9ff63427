"""Checks of arguments that constructors share."""

from dflows.errors import UserError

__all__ = ["check_dropout", "check_positive"]


def check_positive(**sizes: int) -> None:
    """Refuses sizes below 1.

    Raises:
        UserError: If a size is below 1; the message names its key.
    """
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} is {size}: give at least 1")


def check_dropout(dropout: float, name: str = "dropout") -> None:
    """Refuses probabilities outside [0, 1).

    Raises:
        UserError: If the probability is outside; the message names it.
    """
    if not 0 <= dropout < 1:
        raise UserError(f"{name} is {dropout}: give a probability from 0 to below 1")
