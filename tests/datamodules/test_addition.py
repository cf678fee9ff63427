import math
from collections import Counter
from itertools import islice, product

import numpy as np
import pytest
import torch

from datamodules.addition import AdditionDataModule
from dflows.errors import UserError
from tests.datamodules.process import Process

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def value(digits, base):
    """The numbers (…) that digits (…, D) write."""
    return (digits * base ** torch.arange(digits.shape[-1]).flip(0)).sum(-1)


def pairs(batches):
    """The pairs of addends as tuples of digits, in order."""
    return [tuple(pair.flatten().tolist()) for _, addends in batches for pair in addends]


def whole(data):
    """All pairs there are: those of evaluation and one round of training."""
    left = data.num_classes ** (2 * data.length) - 2 * data._eval_examples
    assert left % data.batch_size == 0
    stream = islice(data.train_dataloader(), left // data.batch_size)
    return {
        "train": pairs(stream),
        "valid": pairs(data.val_dataloader()),
        "test": pairs(data.test_dataloader()),
    }


class TestSums:
    @pytest.mark.parametrize(("length", "base"), [(1, 2), (1, 10), (2, 3), (3, 2), (2, 10)])
    def test_every_pair_is_added_right(self, length, base):
        data = AdditionDataModule(length, base, 1, eval_examples=1)
        splits = [
            islice(data.train_dataloader(), base ** (2 * length) - 2),
            data.val_dataloader(),
            data.test_dataloader(),
        ]
        found = []
        for split in splits:
            for total, addends in split:
                one, other = value(addends[0], base)
                assert value(total[0], base) == (one + other) % base**length
                found.append(tuple(addends.flatten().tolist()))
        assert sorted(found) == list(product(range(base), repeat=2 * length))

    @pytest.mark.parametrize("length", [10, 20])
    def test_long_numbers(self, length):
        data = AdditionDataModule(length, batch_size=500)
        total, addends = next(iter(data.train_dataloader()))
        assert (total.shape, addends.shape) == ((500, length), (500, 2, length))
        assert total.dtype == addends.dtype == torch.long
        for example in range(500):
            one, other, found = (
                int("".join(map(str, digits.tolist())))
                for digits in (*addends[example], total[example])
            )
            assert found == (one + other) % 10**length


@pytest.mark.parametrize(("length", "base"), [(1, 3), (2, 3), (3, 3), (4, 2), (2, 10)])
def test_what_is_uncertain_from_the_left(length, base):
    told, known = Counter(), Counter()
    for digits in product(range(base), repeat=2 * length):
        one, other = digits[:length], digits[length:]
        total, carry = [], 0
        for a, b in zip(one[::-1], other[::-1], strict=True):
            carry, digit = divmod(a + b + carry, base)
            total.insert(0, digit)
        for place in range(length):
            seen = one[: place + 1], other[: place + 1], tuple(total[:place])
            known[seen] += 1
            told[seen, total[place]] += 1
    nats = -sum(n * math.log(n / known[seen]) for (seen, _), n in told.items())
    data = AdditionDataModule(length, base, eval_examples=1)
    assert data.entropy_from_left == pytest.approx(nats / base ** (2 * length))


class TestOrder:
    @pytest.mark.parametrize(("length", "base"), [(1, 10), (2, 5), (4, 2)])
    def test_splits_have_no_pair_in_common_and_training_meets_each_once(self, length, base):
        data = AdditionDataModule(length, base, batch_size=1, eval_examples=20)
        splits = whole(data)
        assert [len(splits[name]) for name in ("valid", "test")] == [20, 20]
        together = splits["train"] + splits["valid"] + splits["test"]
        assert len(set(together)) == len(together) == base ** (2 * length)

    def test_after_the_last_pair_training_begins_again_without_those_held_out(self):
        data = AdditionDataModule(1, 4, batch_size=12, eval_examples=2)
        first, second = islice(data.train_dataloader(), 2)
        assert torch.equal(first[1], second[1])
        held_out = pairs(data.val_dataloader()) + pairs(data.test_dataloader())
        assert not set(pairs([first])) & set(held_out)

    @pytest.mark.parametrize(("length", "rows"), [(3, 2000), (20, 20_000)])
    def test_digits_are_uniform_and_independent(self, length, rows):
        data = AdditionDataModule(length, 4, rows, eval_examples=100)
        total, addends = next(iter(data.train_dataloader()))
        columns = [*addends.flatten(1).T, *total.T]
        for a, column in enumerate(columns):
            for other in columns[:a]:
                counts = np.bincount(column * 4 + other, minlength=16)
                # Drawn without replacement, the counts of a few pairs scatter a little less.
                expected = rows / 16
                assert ((counts - expected) ** 2 / expected).sum() < 50

    def test_seeds_have_orders_of_their_own_and_splits_are_fixed(self):
        first, again, other = (AdditionDataModule(6, seed=seed) for seed in (0, 0, 1))
        one, two, three = (pairs(data.val_dataloader()) for data in (first, again, other))
        assert one == two
        assert not set(one) & set(three)


class TestLoaders:
    @pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (3, 2)])
    def test_processes_and_workers_share_one_stream(self, ranks, workers):
        alone = pairs(islice(AdditionDataModule(batch_size=12).train_dataloader(), 4))
        loaders = []
        for rank in range(ranks):
            data = AdditionDataModule(batch_size=12 // ranks, num_workers=workers)
            data.trainer = Process(rank, ranks)
            loader = data.train_dataloader()
            loader._next_row = lambda: 0
            loaders.append(islice(loader, 4))
        shared = [batch for together in zip(*loaders, strict=True) for batch in together]
        assert pairs(shared) == alone
        assert len(set(alone)) == len(alone)

    def test_a_resumed_run_goes_on_with_the_next_pair(self):
        data = AdditionDataModule(batch_size=4)
        expected = pairs(islice(data.train_dataloader(), 3))
        resumed = AdditionDataModule(batch_size=4)
        resumed.load_state_dict({**data.state_dict(), "row": 8})
        assert pairs(islice(resumed.train_dataloader(), 1)) == expected[8:]

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_evaluation_reads_everything_once(self, ranks, workers):
        expected = pairs(AdditionDataModule(5, eval_examples=500).val_dataloader())
        found = []
        for rank in range(ranks):
            data = AdditionDataModule(5, 10, 8, 64, eval_examples=500, num_workers=workers)
            data.trainer = Process(rank, ranks)
            found += pairs(data.val_dataloader())
        assert sorted(found) == sorted(expected)
        assert len(found) == 500

    def test_counts(self):
        data = AdditionDataModule(5, 4, eval_examples=300)
        for split, loader in (("valid", data.val_dataloader()), ("test", data.test_dataloader())):
            digits = torch.cat([total for total, _ in loader]).flatten()
            assert torch.equal(data.class_counts(split), digits.bincount(minlength=4))
        assert data.class_counts().tolist() == [1_250_000] * 4
        assert data.entropy == 0
        assert data.decode(torch.tensor([3, 0, 1])) == "3 0 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, not 1"),
        ({"length": 0}, "length must be at least 1, not 0"),
        ({"eval_examples": 0}, "eval_examples must be at least 1"),
        ({"length": 1, "eval_examples": 50}, "have 100 pairs .* takes 100 for .*: lower it"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        AdditionDataModule(**options)
