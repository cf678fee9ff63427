"""Which rows of a table are trained on, validated on and tested on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from datamodules.chunks import Array
from datamodules.counter_rng import CounterRNG
from dflows.errors import UserError

__all__ = ["SPLITS", "SplitRows", "Splits", "parts"]

SPLITS = ("train", "valid", "test")
FRACTIONS = (0.8, 0.1, 0.1)
LEAST_FOLDS = 3


def parts(fractions: Sequence[float]) -> dict[str, tuple[Fraction, Fraction]]:
    """Returns where each split begins and ends, as exact parts of the whole.

    Args:
        fractions: The parts of train, valid and test.

    Raises:
        UserError: If they are not three positive numbers that sum to 1.
    """
    error = UserError(
        "fractions must be three positive numbers that sum to 1, "
        f"the parts of train, valid and test, not {fractions}"
    )
    try:
        # By way of the decimal notation 0.05 is one twentieth, which as a float it is not.
        train, valid, test = (Fraction(str(fraction)) for fraction in fractions)
    except (TypeError, ValueError):
        raise error from None
    if min(train, valid, test) <= 0 or abs(train + valid + test - 1) > Fraction(1, 10**6):
        raise error
    cuts = (Fraction(0), train, train + valid, Fraction(1))
    return dict(zip(SPLITS, itertools.pairwise(cuts), strict=True))


@dataclass(frozen=True)
class SplitRows:
    """Creates the rows of a split: a part of an order of all rows of a table, which is a ring.

    No list of them is held, so that a table may have any number.

    Args:
        first: The place in the order with which the split begins.
        rows: The number of its rows.
        size: The rows of the table.
        seed: The seed of the order; None is the order of the table.

    Example:
        >>> rows = SplitRows(4, 3, size=7, seed=0)
        >>> sorted(rows.at(np.arange(3)).tolist()), rows.hold(np.arange(7)).nonzero()[0].tolist()
        ([2, 3, 5], [2, 3, 5])
    """

    first: int
    rows: int
    size: int
    seed: int | None = None

    def __len__(self) -> int:
        return self.rows

    def at(self, places: Array) -> Array:
        """Returns the rows at places (n,) of the split, from 0."""
        places = (places + self.first) % self.size
        return places if self._random is None else self._random.shuffled(places, self.size)

    def hold(self, rows: Array) -> NDArray[np.bool_]:
        """Returns which rows (n,) of the table are in the split."""
        places = rows if self._random is None else self._random.places(rows, self.size)
        return (places - self.first) % self.size < self.rows

    @cached_property
    def _random(self) -> CounterRNG | None:
        return None if self.seed is None else CounterRNG(self.seed)


@dataclass(frozen=True)
class Splits:
    """Creates the description of how the rows of one table are shared out to the three splits.

    The rows are put into a random order that depends on `seed` and their number alone. The first
    of it are the training split, the next the validation split, the last the test split. With
    `folds` the order is cut into so many equal parts instead: part number `fold` is the test split,
    the one after it (after the last, the first) the validation split, and all others are trained
    on. Over all values of `fold`, every row is tested on once.

    Args:
        fractions: The parts of train, valid and test; 0.8, 0.1 and 0.1 where nothing is given.
        folds: The number of folds, at least 3.
        fold: The fold that is the test split, from 0.
        seed: The seed of the order. It is not the seed of training, and should stay the same where
            figures are compared.

    Raises:
        UserError: If the fractions are not three positive numbers that sum to 1, there are too few
            folds or no such one, or both ways are used.

    Example:
        >>> {name: len(rows) for name, rows in Splits().of(50, "the table").items()}
        {'train': 40, 'valid': 5, 'test': 5}
        >>> {name: len(rows) for name, rows in Splits(folds=5, fold=2).of(50, "it").items()}
        {'train': 30, 'valid': 10, 'test': 10}
    """

    fractions: Sequence[float] | None = None
    folds: int | None = None
    fold: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"splits.seed must be at least 0, not {self.seed}")
        if self.folds is None:
            if self.fold:
                raise UserError(f"splits.fold is {self.fold} of no folds: give splits.folds, too")
            parts(self._fractions)
            return
        if self.fractions is not None:
            raise UserError(
                "splits.folds and splits.fractions are both given: leave one of them away"
            )
        if self.folds < LEAST_FOLDS:
            raise UserError(
                f"splits.folds must be at least {LEAST_FOLDS}, one to test on, one to validate on "
                f"and the rest to train on, not {self.folds}"
            )
        if not 0 <= self.fold < self.folds:
            raise UserError(f"splits.fold must be from 0 to {self.folds - 1}, not {self.fold}")

    @property
    def _fractions(self) -> Sequence[float]:
        return FRACTIONS if self.fractions is None else self.fractions

    def of(self, size: int, name: str) -> dict[str, SplitRows]:
        """Returns the rows of every split.

        Args:
            size: The rows of the table.
            name: What messages call it.

        Raises:
            UserError: If a split would be empty, or there are fewer rows than folds.
        """
        if self.folds is not None:
            return self._of_folds(size, name, self.folds)
        found = {}
        for split, part in parts(self._fractions).items():
            low, high = (int(size * cut) for cut in part)
            if low == high:
                raise UserError(
                    f"the fractions {[*self._fractions]} leave no row of the {size} "
                    f"of {name} to {split}: give more rows, or other fractions in splits.fractions"
                )
            found[split] = SplitRows(low, high - low, size, self.seed)
        return found

    def _of_folds(self, size: int, name: str, folds: int) -> dict[str, SplitRows]:
        if size < folds:
            raise UserError(
                f"{name} has {size} rows, fewer than the {folds} folds: give fewer in splits.folds"
            )
        cuts = [fold * size // folds for fold in range(folds + 1)]
        after = (self.fold + 1) % folds
        test, valid = cuts[self.fold : self.fold + 2], cuts[after : after + 2]
        sizes = {"valid": valid[1] - valid[0], "test": test[1] - test[0]}
        begins = {"train": valid[1], "valid": valid[0], "test": test[0]}
        sizes["train"] = size - sum(sizes.values())
        return {split: SplitRows(begins[split], sizes[split], size, self.seed) for split in SPLITS}
