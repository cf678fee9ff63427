"""Which rows are in which split: every one in one of them, in an order that the seed shuffles."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.splits import SPLITS, SplitRows, Splits
from dflows.errors import UserError


def listed(rows):
    """All rows of a split, in its order."""
    return rows.at(np.arange(len(rows))).tolist()


@given(st.integers(10, 300), st.integers(0, 2**63))
def test_every_row_is_in_one_split(size, seed):
    splits = Splits(seed=seed).of(size, "the table")
    rows = [row for split in SPLITS for row in listed(splits[split])]
    assert sorted(rows) == list(range(size))
    for split in SPLITS:
        (held,) = splits[split].hold(np.arange(size)).nonzero()
        assert held.tolist() == sorted(listed(splits[split]))


@given(st.integers(3, 9), st.integers(0, 100), st.integers(0, 2**63))
def test_every_row_is_tested_on_in_one_fold(folds, more, seed):
    size = folds + more
    tested, validated = Counter(), Counter()
    for fold in range(folds):
        splits = Splits(folds=folds, fold=fold, seed=seed).of(size, "the table")
        rows = {split: listed(splits[split]) for split in SPLITS}
        assert sorted(itertools.chain(*rows.values())) == list(range(size))
        assert size // folds <= len(rows["test"]) <= -(-size // folds)
        tested.update(rows["test"])
        validated.update(rows["valid"])
    assert tested == validated == Counter(range(size))


def test_the_fold_after_that_of_the_test_is_validated_on():
    folds = [Splits(folds=4, fold=fold).of(20, "the table") for fold in range(4)]
    for fold in range(4):
        assert listed(folds[fold]["valid"]) == listed(folds[(fold + 1) % 4]["test"])


def test_fractions_are_taken_exactly():
    sizes = {split: len(rows) for split, rows in Splits([0.9, 0.05, 0.05]).of(20, "it").items()}
    assert sizes == {"train": 18, "valid": 1, "test": 1}


def test_the_order_depends_on_the_seed_alone_and_is_shuffled():
    first, again, other = (listed(Splits(seed=s).of(100, "it")["train"]) for s in (0, 0, 1))
    assert first == again != other
    assert first != sorted(first)
    # The order must never change: a checkpoint remembers its seed, and no list of rows.
    tested = [listed(Splits().of(size, "it")["test"]) for size in (10, 20)]
    assert tested == [[1], [12, 18]]


def test_given_splits_have_the_order_of_the_table():
    rows = SplitRows(0, 7, size=7)
    assert listed(rows) == list(range(7))
    assert rows.hold(np.arange(7)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": [0.5, 0.5]}, "three positive numbers that sum to 1, .* not \\[0.5, 0.5\\]"),
        ({"fractions": []}, "three positive numbers that sum to 1, .* not \\[\\]"),
        ({"fractions": [0.9, 0.05, 0.04]}, "three positive numbers that sum to 1"),
        ({"fractions": [1.0, 0.0, 0.0]}, "three positive numbers that sum to 1"),
        ({"fractions": [0.8, 0.1, 0.1], "folds": 5}, "both given: leave one of them away"),
        ({"folds": 2}, "splits.folds must be at least 3, .* not 2"),
        ({"folds": 5, "fold": 5}, "splits.fold must be from 0 to 4, not 5"),
        ({"folds": 5, "fold": -1}, "splits.fold must be from 0 to 4, not -1"),
        ({"fold": 1}, "splits.fold is 1 of no folds: give splits.folds, too"),
        ({"seed": -1}, "splits.seed must be at least 0, not -1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        Splits(**options)


@pytest.mark.parametrize(
    ("splits", "size", "message"),
    [
        (Splits(), 5, r"leave no row of the 5 of my.npy to valid: give more rows, or other"),
        (Splits([0.2, 0.4, 0.4]), 4, "leave no row of the 4 of my.npy to train"),
        (Splits(folds=5), 4, "my.npy has 4 rows, fewer than the 5 folds: give fewer"),
    ],
)
def test_a_table_that_is_too_short_is_refused(splits, size, message):
    with pytest.raises(UserError, match=message):
        splits.of(size, "my.npy")
