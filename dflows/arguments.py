"""Checks of arguments that constructors share."""

import math

from dflows.errors import UserError
from dflows.memory import check_memory

__all__ = [
    "check_dimensions",
    "check_dropout",
    "check_event",
    "check_layers",
    "check_positive",
    "check_temperature",
]

MOST_LAYERS = 10_000
BYTES = 64
"""What a dimension takes at least: its value, level, place and noise, in numbers of 8 bytes."""


def check_positive(**sizes: int) -> None:
    """Refuses sizes below 1.

    Raises:
        UserError: If a size is below 1; the message names its key.
    """
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} is {size}: give at least 1")


def check_layers(**numbers: int) -> None:
    """Refuses numbers of layers, or of other parts that are made one after the other.

    Raises:
        UserError: If a number is below 1 or above 10,000; the message names its key.
    """
    check_positive(**numbers)
    for name, number in numbers.items():
        if number > MOST_LAYERS:
            raise UserError(f"{name} is {number:,}: give at most {MOST_LAYERS:,}")


def check_dimensions(length: int) -> int:
    """Returns a number of dimensions, which a single event can have.

    Raises:
        UserError: If it is below 1, or an event takes more than the memory.
    """
    check_positive(length=length)
    check_memory(BYTES * length, f"an event with length {length:,}", "give a smaller length")
    return length


def check_event(length: int | None, most: int) -> int:
    """Returns the number of dimensions of an event: all D, where none is given.

    Raises:
        UserError: If it is not in 1..D.
    """
    length = most if length is None else length
    if not 1 <= length <= most:
        raise UserError(f"length is {length}: give 1 to {most}, the flow's own")
    return length


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
