import numpy as np
import pytest

from datamodules.counter_rng import CounterRNG


def test_entries_do_not_depend_on_which_others_are_computed():
    numbers = np.arange(1000)
    together = CounterRNG(3, 1).bits(numbers)
    assert np.array_equal(CounterRNG(3, 1).bits(numbers[::-7]), together[::-7])


def test_known_sequence():
    # SplitMix64 from state 0 begins with these; the sequence must never change, or resume would.
    counter = CounterRNG(0)
    counter._state = np.zeros(1, np.uint64)
    assert counter.bits(np.arange(2)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("other", [(1,), (0, 0), (0, 1), (2**40,)])
def test_keys_are_apart(other):
    numbers = np.arange(100)
    assert not np.intersect1d(CounterRNG(0).bits(numbers), CounterRNG(*other).bits(numbers)).size


def test_uniform():
    draws = CounterRNG(5).uniform(np.arange(100_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts, _ = np.histogram(draws, bins=50, range=(0, 1))
    assert ((counts - 2000) ** 2 / 2000).sum() < 90  # chi-square, 49 degrees of freedom


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_permutation(size):
    order = CounterRNG(7).permutation(size)
    assert sorted(order) == list(range(size))
    if size > 2:
        assert not np.array_equal(order, CounterRNG(8).permutation(size))


def test_integer_covers_its_range():
    assert {CounterRNG(seed).integer(3) for seed in range(50)} == {0, 1, 2}
    assert CounterRNG(0).integer(1) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000, 10**12])
def test_the_places_of_a_shuffle_are_found_again(size):
    numbers = np.unique(np.linspace(0, size - 1, 1000).astype(np.int64))
    order = CounterRNG(3).shuffled(numbers, size)
    assert np.array_equal(CounterRNG(3).places(order, size), numbers)
    assert np.array_equal(
        CounterRNG(3).shuffled(CounterRNG(3).places(numbers, size), size), numbers
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000])
def test_a_shuffle_is_a_permutation_place_by_place(size):
    places = np.arange(size)
    order = CounterRNG(3).shuffled(places, size)
    assert sorted(order) == list(places)
    assert CounterRNG(3).shuffled(places[::-1], size).tolist() == order[::-1].tolist()
    assert size < 5 or (CounterRNG(4).shuffled(places, size) != order).any()


def test_a_shuffle_is_even():
    # How often each of 5 numbers stands at each of 5 places, over many keys.
    orders = np.stack([CounterRNG(key).shuffled(np.arange(5), 5) for key in range(2000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=5) for place in range(5)])
    assert ((counts - 400) ** 2 / 400).sum() < 45  # 16 degrees of freedom
