"""Right contexts, and the table of messages: against sums over all that may be between."""

import itertools

import pytest
import torch

from dflows.ngrams import NGrams
from dflows.ngrams.messages import MOST_GAP, RightContext, look_up, right_context_messages
from dflows.orderings import BehindContext, CoarseToFine, Natural, Parity, Reversed, Strided

K = 3


@pytest.fixture(scope="module")
def ngrams():
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
        (BehindContext(Strided(3)), 6, [-1, 1, 0, -1, -1, -1], [0, 0, 1, 0, 0, 0]),
        (Parity(), 5, [-1, 0, -1, 0, -1], [0, 0, 0, 0, 0]),
        (CoarseToFine(4), 8, [-1, 0, -1, 0, -1, 0, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0]),
        (Strided(MOST_GAP + 4), 2 * (MOST_GAP + 4), None, None),
    ],
    ids=str,
)
def test_the_right_context_is_what_of_lower_levels_follows(ordering, length, gap, second):
    levels = ordering.levels(length)
    found = RightContext.of(levels)
    if gap is None:
        assert found.gap[: MOST_GAP + 4].tolist() == [-1] * 3 + [*range(MOST_GAP, -1, -1)]
    else:
        assert found.gap.tolist() == gap
        assert found.second.int().tolist() == second
    assert found.any == any(number >= 0 for number in found.gap.tolist())
    for d, number in enumerate(found.gap.tolist()):
        if number >= 0:
            between, right = levels[d : d + number + 1], levels[d + number + 1]
            assert levels[d - 1] < levels[d] <= between.min()
            assert right < levels[d]


@pytest.mark.parametrize("gap", range(3))
@pytest.mark.parametrize("known", [1, 2])
def test_the_table_sums_over_what_is_between(ngrams, gap, known):
    table = right_context_messages(ngrams.trigrams()).exp()
    for right in itertools.product(range(K), repeat=known):
        for before in range(K):
            likelihoods = torch.zeros(K, dtype=torch.double)
            for x, *between in itertools.product(range(K), repeat=1 + gap):
                row = torch.tensor([[before, x, *between, *right]])
                triples = row.unfold(1, 3, 1)[0]
                history = ngrams.pack(triples)[:, 2]
                probs = ngrams.next_probs(history, 2)
                likelihoods[x] += probs.gather(1, triples[:, 2:]).prod()
            second = right[1] if known == 2 else K
            torch.testing.assert_close(table[gap, right[0], second, before], likelihoods)


def test_messages_are_looked_up_by_rows_and_counted_anew(ngrams):
    rows = [torch.tensor(column) for column in ([0, -1, 2], [1, 2, 0], [2, K, K], [0, 1, 2])]
    found = look_up(ngrams.messages(), *rows)
    table = right_context_messages(ngrams.trigrams().float())
    assert torch.equal(ngrams.messages(), table)
    assert torch.equal(found[0], table[0, 1, 2, 0])
    assert torch.equal(found[1], torch.zeros(K))
    assert torch.equal(found[2], table[2, 0, K, 2])
    other = NGrams(K, 4)
    other.load_state_dict(ngrams.state_dict())
    assert torch.equal(look_up(other.messages(), *rows), found)
    other.count([torch.tensor([0, 0, 1, 2, 2, 2, 1])])
    assert not torch.equal(look_up(other.messages(), *rows), found)


def test_what_did_follow_is_replaced_by_its_likelihood_when_left_out(ngrams):
    """Of the sum over what may be between, one term is exchanged."""
    table = right_context_messages(ngrams.trigrams())
    gap, first, second, before, own = torch.tensor([[1], [2], [K], [0], [1]])
    whole, rest = torch.tensor([[0.01], [0.004]], dtype=torch.double).log()
    found = look_up(table, gap, first, second, before, (own, whole, rest))[0].exp()
    expected = table[1, 2, K, 0].exp()
    expected[1] += 0.004 - 0.01
    torch.testing.assert_close(found, expected)
