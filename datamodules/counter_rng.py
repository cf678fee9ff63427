"""Random numbers that are addressed by a number, so that nobody has to keep a generator's state."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["CounterRNG"]

ROUNDS = 6
"""Rounds of a Feistel network, more than the four that make it hard to tell from chance."""

Half: TypeAlias = NDArray[np.uint64]
Step: TypeAlias = Callable[[Half, Half, np.uint64], tuple[Half, Half]]
"""Maps the upper and the lower bits of numbers one to one, given the mask of either."""


class CounterRNG:
    """Creates a random sequence with random access to its entries.

    It is SplitMix64 read at arbitrary places: every process, worker and resumed run computes just
    the entries that it needs, and all of them see the same sequence.

    Args:
        key: Non-negative integers; each tuple of them is a sequence of its own.

    References:
        | Fast Splittable Pseudorandom Number Generators (Steele et al., 2014)
        | https://doi.org/10.1145/2660193.2660195

    Example:
        >>> CounterRNG(0).uniform(np.arange(3)).round(3)
        array([0.324, 0.68 , 0.704])
        >>> CounterRNG(0).uniform(np.array([2])).round(3)
        array([0.704])
    """

    def __init__(self, *key: int) -> None:
        # The length keeps (0,) and (0, 0) apart, which are one seed to SeedSequence.
        self._state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)

    def bits(self, numbers: NDArray[np.integer]) -> NDArray[np.uint64]:
        """Returns the entries of the given numbers, shape (n,), each 64 random bits."""
        z = self._state + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def uniform(self, numbers: NDArray[np.integer]) -> NDArray[np.float64]:
        """Returns the entries of the given numbers as uniform draws from [0, 1), shape (n,)."""
        return (self.bits(numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integer(self, high: int) -> int:
        """Returns one draw from 0..high-1, by the sequence's first entry."""
        return int(self.bits(np.zeros(1, np.int64))[0]) % high

    def permutation(self, size: int) -> NDArray[np.int64]:
        """Returns a random order of 0..size-1."""
        return self.bits(np.arange(size)).argsort(kind="stable")

    def shuffled(self, numbers: NDArray[np.integer], size: int) -> NDArray[np.int64]:
        """Returns what stands at places of a random order of 0..size-1, without all the others.

        It is another order than that of :meth:`permutation`: a Feistel network over the bits of a
        place, again where its result is no place.

        Args:
            numbers: The places (n,), from 0 to below `size`.
            size: How many there are.

        Example:
            >>> sorted(CounterRNG(0).shuffled(np.arange(5), 5).tolist())
            [0, 1, 2, 3, 4]
        """
        return self._walked(numbers, size, self._forth)

    def places(self, numbers: NDArray[np.integer], size: int) -> NDArray[np.int64]:
        """Returns at which places of that order numbers stand: the inverse of :meth:`shuffled`.

        Args:
            numbers: The numbers (n,), from 0 to below `size`.
            size: How many there are.

        Example:
            >>> CounterRNG(0).places(CounterRNG(0).shuffled(np.arange(5), 5), 5)
            array([0, 1, 2, 3, 4])
        """
        return self._walked(numbers, size, self._back)

    def _walked(self, numbers: NDArray[np.integer], size: int, step: Step) -> NDArray[np.int64]:
        """Returns what a bijection of some 2**n numbers gives, again until it is below `size`."""
        half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        mask = (np.uint64(1) << half) - np.uint64(1)
        found = numbers.astype(np.uint64)
        beyond = np.ones(len(found), bool)
        while beyond.any():
            left, right = step(found[beyond] >> half, found[beyond] & mask, mask)
            found[beyond] = (left << half) | right
            beyond = found >= size
        return found.astype(np.int64)

    def _forth(self, left: Half, right: Half, mask: np.uint64) -> tuple[Half, Half]:
        for turn in range(ROUNDS):
            left, right = right, left ^ self._drawn(right, turn, mask)
        return left, right

    def _back(self, left: Half, right: Half, mask: np.uint64) -> tuple[Half, Half]:
        for turn in reversed(range(ROUNDS)):
            left, right = right ^ self._drawn(left, turn, mask), left
        return left, right

    def _drawn(self, half: Half, turn: int, mask: np.uint64) -> Half:
        return self.bits(half + np.uint64(turn << 48)) & mask
