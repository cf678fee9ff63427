import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflows.orderings import (
    BehindContext,
    Blocks,
    Checkerboard,
    CoarseToFine,
    Halves,
    Natural,
    Ordering,
    Parity,
    Permutation,
    Reversed,
    Strided,
    untransformed,
)

EXPECTED = [
    (Natural(), [0, 1, 2, 3, 4]),
    (Reversed(), [4, 3, 2, 1, 0]),
    (Permutation([2, 0, 4, 1, 3]), [1, 3, 0, 4, 2]),
    (Parity(), [0, 1, 0, 1, 0]),
    (Parity(first=1), [1, 0, 1, 0, 1]),
    (Halves(), [0, 0, 1, 1, 1]),
    (Halves(first=1), [1, 1, 0, 0, 0]),
    (Blocks(size=2), [0, 0, 1, 1, 2]),
    (Blocks(size=9), [0, 0, 0, 0, 0]),
    (Strided(columns=3), [0, 1, 2, 0, 1]),
    (Strided(columns=1), [0, 0, 0, 0, 0]),
    (Checkerboard(columns=2), [0, 1, 1, 0, 0]),
    (Checkerboard(columns=2, first=1), [1, 0, 0, 1, 1]),
    (Checkerboard(columns=1), [0, 1, 0, 1, 0]),
    (CoarseToFine(stride=4), [0, 2, 1, 2, 0]),
    (CoarseToFine(stride=1), [0, 0, 0, 0, 0]),
    (CoarseToFine(stride=16), [0, 3, 2, 3, 1]),  # a level without dimensions is left out
]


BEHIND = [
    (BehindContext(Reversed()), [5, 4, 3, 2, 1]),
    (BehindContext(Parity()), [1, 2, 1, 2, 1]),
    (BehindContext(Blocks(size=9)), [1, 1, 1, 1, 1]),
]


@pytest.mark.parametrize(("ordering", "levels"), EXPECTED + BEHIND, ids=lambda value: str(value))
def test_levels(ordering, levels):
    assert ordering.levels(5).tolist() == levels


@st.composite
def orderings(draw):
    size = draw(st.integers(1, 9))
    return draw(
        st.sampled_from(
            [
                Natural(),
                Reversed(),
                Parity(),
                Parity(first=1),
                Halves(),
                Halves(first=1),
                Blocks(size),
                Strided(size),
                Checkerboard(size, draw(st.integers(0, 1))),
                CoarseToFine(2 ** draw(st.integers(0, 5))),
                Permutation(draw(st.permutations(range(20)))),
            ]
        )
    )


@given(ordering=orderings(), length=st.integers(1, 20))
def test_levels_have_no_gap_whatever_the_length(ordering, length):
    levels = ordering.levels(length)
    assert levels.dtype == torch.long
    assert levels.shape == (length,)
    assert levels.unique().tolist() == list(range(int(levels.max()) + 1))


@given(order=st.permutations(range(8)), length=st.integers(1, 8))
def test_a_shorter_event_keeps_the_order_of_a_permutation(order, length):
    levels = Permutation(order).levels(length)
    kept = [dimension for dimension in order if dimension < length]
    assert levels.argsort().tolist() == kept


@pytest.mark.parametrize("columns", [2, 3, 4, 7])
def test_neighbours_of_a_checkerboard_are_of_the_other_level(columns):
    levels = Checkerboard(columns).levels(5 * columns).view(5, columns)
    assert (levels[1:] != levels[:-1]).all()
    assert (levels[:, 1:] != levels[:, :-1]).all()
    if columns % 2:
        assert torch.equal(levels.flatten(), Parity().levels(5 * columns))


def test_orderings_are_equal_if_they_say_the_same():
    assert repr(Strided(columns=3)) == "Strided(columns=3)"
    assert Strided(3) == Strided(columns=3) != Strided(4)
    assert Natural() != Reversed()
    assert Natural() != "Natural()"
    assert len({Permutation([1, 0]), Permutation((1, 0)), Parity(), Parity(first=1)}) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Permutation([0, 2]), "no permutation"),
        (lambda: Permutation([]), "no permutation"),
        (lambda: Permutation([1, 0]).levels(3), "orders 2 dimensions, and there are 3"),
        (lambda: Parity(first=2), "give 0 or 1"),
        (lambda: Halves(first=-1), "give 0 or 1"),
        (lambda: Blocks(size=0), "size is 0: give at least 1"),
        (lambda: Strided(columns=0), "columns is 0: give at least 1"),
        (lambda: Checkerboard(columns=0), "columns is 0: give at least 1"),
        (lambda: Checkerboard(columns=4, first=2), "give 0 or 1"),
        (lambda: CoarseToFine(stride=6), "power of 2"),
        (lambda: CoarseToFine(stride=0), "stride is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_ordering_of_ones_own_needs_its_levels_alone():
    class LastFirst(Ordering):
        def levels(self, length):
            return (torch.arange(length) != length - 1).long()

    assert repr(LastFirst()) == "LastFirst()"
    assert untransformed([LastFirst(), Natural()], 3).tolist() == []
    assert untransformed([LastFirst()], 3).tolist() == [2]


@pytest.mark.parametrize(
    ("stack", "dimensions"),
    [
        ([], [0, 1, 2, 3, 4]),
        ([Parity()], [0, 2, 4]),
        ([Parity(), Parity(first=1)], []),
        ([Natural(), Strided(columns=4)], [0]),
        ([Natural(), Reversed()], []),
        ([Halves(), Parity()], [0]),
        ([Strided(columns=1)], [0, 1, 2, 3, 4]),
    ],
)
def test_untransformed_are_of_level_0_in_every_ordering(stack, dimensions):
    assert untransformed(stack, 5).tolist() == dimensions
