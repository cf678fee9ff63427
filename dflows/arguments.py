"""Checks of arguments that constructors share."""

import math

from dflows.errors import UserError

__all__ = ["check_dropout", "check_positive", "check_temperature"]


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


def check_temperature(temperature: float) -> float:
    """Returns a temperature.

    Raises:
        UserError: If it is not positive, or not finite.
    """
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature is {temperature}: give a positive number")
    return temperature
