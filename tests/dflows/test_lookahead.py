"""What stands ahead, as trigrams see it: which dimensions know of any, and Bayes' theorem."""

import itertools

import pytest
import torch

from dflows.backbones import LevelConvolution
from dflows.conditioner import Conditioner
from dflows.lookahead import MOST_CLASSES, MOST_GAP, Ahead, lookahead
from dflows.ngrams import NGrams
from dflows.orderings import CoarseToFine, Natural, Parity, Reversed, Strided

K = 3


@pytest.fixture(scope="module")
def grams():
    counted = NGrams(K, 4)
    counted.count([torch.randint(K, (300,), generator=torch.Generator().manual_seed(0))])
    return counted


@pytest.mark.parametrize(
    ("ordering", "length", "gap", "second"),
    [
        (Natural(), 4, [-1, -1, -1, -1], [0, 0, 0, 0]),
        # Nothing is known right before a dimension that all behind it come before.
        (Reversed(), 4, [-1, -1, -1, -1], [0, 0, 0, 0]),
        (Strided(3), 8, [-1, 1, 0, -1, 1, 0, -1, -1], [0, 0, 1, 0, 0, 1, 0, 0]),
        (Parity(), 5, [-1, 0, -1, 0, -1], [0, 0, 0, 0, 0]),
        (CoarseToFine(4), 8, [-1, 0, -1, 0, -1, 0, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0]),
        (Strided(MOST_GAP + 4), 2 * (MOST_GAP + 4), None, None),
    ],
)
def test_what_is_known_ahead(ordering, length, gap, second):
    levels = ordering.levels(length)
    found = Ahead.of(levels)
    if gap is None:
        assert found.gap[: MOST_GAP + 4].tolist() == [-1] * 3 + [*range(MOST_GAP, -1, -1)]
    else:
        assert found.gap.tolist() == gap
        assert found.second.int().tolist() == second
    for d, number in enumerate(found.gap.tolist()):
        if number >= 0:
            between, ahead = levels[d : d + number + 1], levels[d + number + 1]
            assert levels[d - 1] < levels[d] <= between.min()
            assert ahead < levels[d]


@pytest.mark.parametrize("gap", range(3))
@pytest.mark.parametrize("known", [1, 2])
def test_the_table_sums_over_what_is_between(grams, gap, known):
    table = lookahead(grams._trigrams()).exp()
    for ahead in itertools.product(range(K), repeat=known):
        for before in range(K):
            likelihoods = torch.zeros(K, dtype=torch.double)
            for x, *between in itertools.product(range(K), repeat=1 + gap):
                row = torch.tensor([[before, x, *between, *ahead]])
                pairs = row.unfold(1, 3, 1)[0]
                history = grams.pack(pairs)[:, 2]
                probs = grams.following(history, 2)
                likelihoods[x] += probs.gather(1, pairs[:, 2:]).prod()
            second = ahead[1] if known == 2 else K
            expected = likelihoods.to(table.dtype)
            torch.testing.assert_close(table[gap, ahead[0], second, before], expected)


def test_it_is_looked_up_by_rows_and_counted_anew(grams):
    rows = [torch.tensor(column) for column in ([0, -1, 2], [1, 2, 0], [2, K, K], [0, 1, 2])]
    found = grams.ahead(*rows)
    table = lookahead(grams._trigrams().float())
    assert torch.equal(found[0], table[0, 1, 2, 0])
    assert torch.equal(found[1], torch.zeros(K))
    assert torch.equal(found[2], table[2, 0, K, 2])
    other = NGrams(K, 4)
    other.load_state_dict(grams.state_dict())
    assert torch.equal(other.ahead(*rows), found)
    other.count([torch.tensor([0, 0, 1, 2, 2, 2, 1])])
    assert not torch.equal(other.ahead(*rows), found)


def test_both_sides_are_bayes_theorem():
    """With a chain of second order and all of one dimension's neighbours, nothing is missing."""
    grams = NGrams(K, 3)
    generator = torch.Generator().manual_seed(1)
    grams.count([torch.randint(K, (200,), generator=generator)])
    length = 6
    conditioner = Conditioner(K, length, K, Strided(3), LevelConvolution(8, layers=1), grams=grams)
    for parameter in (conditioner.head.weight, conditioner.head.bias):
        torch.nn.init.zeros_(parameter)
    y = torch.randint(K, (1, length), generator=generator)
    d = 2  # the last of the first row: all but itself and the last of the second are known
    joint = torch.zeros(K)
    for value in range(K):
        row = y.clone()
        row[0, d] = value
        joint[value] = grams.log_prob(row)[0, : d + 3].sum()
    with torch.no_grad():
        actual = conditioner(y)[0, d].log_softmax(-1)
    torch.testing.assert_close(actual, joint.log_softmax(-1))


def test_what_was_counted_is_told_as_though_it_had_not_been(grams):
    """Of the sum over what may be between, the term of what did follow is without itself."""
    length = 6
    conditioner = Conditioner(K, length, K, Strided(3), LevelConvolution(8, layers=1), grams=grams)
    for parameter in (conditioner.head.weight, conditioner.head.bias):
        torch.nn.init.zeros_(parameter)
    y = torch.tensor([[2, 0, 1, 1, 0, 2]])

    def trigram(*classes, own=False):
        history = grams.pack(torch.tensor([classes]))[:, 2]
        following = torch.tensor(classes[2:]) if own else None
        return grams.following(history, 2, following)[0, classes[2]]

    conditioner.without_own = True
    with torch.no_grad():
        logits = conditioner(y)[0].double()
    history = grams.pack(y)[0]
    x, v, w, a, b = y[0, :5].tolist()
    for d, seen, own in ((1, 1, v), (2, 2, w)):
        left = grams.following(history[d : d + 1], seen, torch.tensor([own]))[0]
        ahead = torch.zeros(K, dtype=torch.double)
        for value in range(K):
            if d == 1:
                terms = [
                    trigram(x, value, between, own=(value, between) == (v, w))
                    * trigram(value, between, a, own=(value, between) == (v, w))
                    for between in range(K)
                ]
                ahead[value] = sum(terms)
            else:
                ahead[value] = trigram(v, value, a, own=value == w) * trigram(
                    value, a, b, own=value == w
                )
        torch.testing.assert_close(logits[d], (left * ahead).log(), rtol=1e-4, atol=1e-5)


def test_of_many_classes_there_is_no_table():
    few, many = (
        Conditioner(k, 6, k, Strided(3), LevelConvolution(8), grams=NGrams(k, 3))
        for k in (MOST_CLASSES, MOST_CLASSES + 1)
    )
    assert (few.looks_ahead, many.looks_ahead) == (True, False)
    y = torch.zeros(2, 6, dtype=torch.long)
    assert many(y).shape == (2, 6, MOST_CLASSES + 1)
