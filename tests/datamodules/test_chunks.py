from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.chunks import Cut, count, regroup

sizes = st.lists(st.integers(0, 5), max_size=6)


def split(lengths):
    cuts = np.cumsum([0, *lengths])
    return [np.arange(low, high) for low, high in pairwise(cuts)]


@given(sizes, st.integers(0, 12), st.integers(0, 12))
def test_cut(lengths, low, high):
    chunks = split(lengths)
    found = [value for chunk in Cut(chunks, low, high) for value in chunk]
    assert found == list(range(low, min(high, sum(lengths))))


@given(sizes, st.integers(1, 7))
def test_regroup(lengths, size):
    groups = list(regroup(split(lengths), size))
    assert [value for group in groups for value in group] == list(range(sum(lengths)))
    assert all(len(group) == size for group in groups[:-1])
    assert all(0 < len(group) <= size for group in groups)


@given(sizes)
def test_count(lengths):
    chunks = [chunk % 4 for chunk in split(lengths)]
    values = np.concatenate([np.zeros(0, np.int64), *chunks])
    assert np.array_equal(count(chunks), np.bincount(values)[: len(count(chunks))])
    assert count(chunks).sum() == len(values)


def test_count_beyond_the_basic_plane():
    total = count([np.array([7], np.uint8), np.array([0x1F600], "<u4"), np.array([7], np.uint16)])
    assert total[7] == 2
    assert total[0x1F600] == 1
    assert total.sum() == 3


@pytest.mark.parametrize("size", [1, 3, 100])
def test_regroup_of_one_long_chunk_copies_nothing(size):
    values = np.arange(7)
    assert np.shares_memory(next(regroup([values, values[:0]], min(size, 7))), values)
