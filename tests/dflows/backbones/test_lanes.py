import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflows.backbones.lanes import (
    TOLD_APART,
    LaneDistances,
    known_ahead,
    lane_distances,
    lanes_of,
    steps_ahead,
)
from dflows.errors import UserError
from dflows.orderings import CoarseToFine, Halves, Natural, Parity, Reversed, Strided


@given(length=st.integers(1, 20), columns=st.integers(1, 20), diverging=st.booleans())
def test_each_dimension_is_in_one_lane_at_its_level(length, columns, diverging):
    levels = Strided(columns).levels(length)
    if diverging:  # every other lane from right to left
        even = torch.arange(length) // columns % 2 == 0
        levels = torch.where(even, columns - 1 - levels, levels)
        if length % columns and length // columns % 2 == 0:
            levels[length // columns * columns :] -= columns - length % columns
    lanes = lanes_of(levels)
    assert lanes.dimensions.shape[1] == int(levels.max()) + 1
    held = lanes.dimensions[lanes.dimensions < length]
    assert held.sort().values.tolist() == list(range(length))
    for lane in lanes.dimensions:
        found = lane[lane < length]
        assert levels[found].tolist() == list(range(len(found)))
        steps = found.diff()
        assert len(steps.unique()) <= 1
        assert all(step in (-1, 1) for step in steps.tolist())
        assert len(steps) == 0 or (lanes.directions[found] == steps[0]).all()
    for level, members in enumerate(lanes.members):
        there = (lanes.dimensions[:, level] < length).nonzero().squeeze(-1)
        assert members is None if len(there) == len(lanes.dimensions) else members.equal(there)


@pytest.mark.parametrize(
    ("ordering", "lanes"),
    [
        (Natural(), [[0, 1, 2, 3, 4]]),
        (Reversed(), [[4, 3, 2, 1, 0]]),
        (Strided(2), [[0, 1], [2, 3], [4, 5]]),
        (Parity(), [[0, 1], [2, 3], [4, 5]]),
        (Strided(1), [[0], [1], [2], [3], [4]]),
    ],
    ids=str,
)
def test_lanes_of_orderings(ordering, lanes):
    assert lanes_of(ordering.levels(5)).dimensions.tolist() == lanes


@pytest.mark.parametrize("ordering", [CoarseToFine(4), Halves(), Parity(first=1)], ids=str)
def test_other_orderings_have_no_lanes(ordering):
    assert lanes_of(ordering.levels(5)) is None


@given(data=st.data(), length=st.integers(1, 8), reach=st.integers(0, 9))
def test_only_lower_levels_are_known_ahead(data, length, reach):
    levels = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)))
    signs = st.lists(st.sampled_from([-1, 1]), min_size=length, max_size=length)
    directions = torch.tensor(data.draw(signs))
    known = known_ahead(levels, directions, reach)
    assert known.shape == (length, reach)
    for d in range(length):
        ahead = [d + int(directions[d]) * offset for offset in range(1, reach + 1)]
        lower = [0 <= e < length and bool(levels[e] < levels[d]) for e in ahead]
        assert known[d].tolist() == [
            e if sees else length for e, sees in zip(ahead, lower, strict=True)
        ]
        first = 1 + lower.index(True) if any(lower) else 0
        assert steps_ahead(known < length)[d] == first


@given(
    length=st.integers(1, 60),
    columns=st.integers(1, 60),
    context=st.integers(0, 2),
    flipped=st.booleans(),
)
def test_distances_are_those_to_the_head_and_to_what_is_known_ahead(
    length, columns, context, flipped
):
    levels = Strided(columns).levels(length)
    levels = levels.flip(0) if flipped else levels
    tokens = torch.full((context,), -1)
    found = lane_distances(torch.cat([tokens, levels]), "a reader", "or none")
    assert found.shape == (2, context + length)
    assert (found[:, :context] == -1).all()
    from_head, ahead = found[:, context:].flip(1) if flipped else found[:, context:]
    for d in range(length):
        place = d % columns
        assert from_head[d] == min(place, TOLD_APART)
        # The head of the next lane, where there is one, is the first that is known.
        to_next = columns - place
        is_near = place > 0 and d + to_next < length and to_next <= TOLD_APART
        assert ahead[d] == (to_next if is_near else 0)


def test_distances_are_embedded_and_context_is_not():
    distances = LaneDistances(4, "a reader", "or none")
    found = distances(torch.tensor([-1, 0, 1, 2, 0, 1]))
    assert found.shape == (6, 4)
    assert not found[0].any()
    assert torch.equal(found[1], found[4])
    # At equal distance from the head, one of them knows what is ahead.
    assert not torch.equal(found[2], found[5])
    with pytest.raises(
        UserError, match=r"a reader and serves .* not the levels \[0, 2, 1\]: .*none"
    ):
        distances(torch.tensor([0, 2, 1]))
