"""Cross-fitting: examples that were counted are scored by the other half of the text."""

import copy

import pytest
import torch

from dflows.experts import leave_one_out
from dflows.ngrams import NGramExpert, NGrams, cross_fitting
from dflows.ngrams.cross_fitting import CrossFit
from dflows.orderings import Natural, Strided

K, ORDER, PART = 4, 4, 50
ORDERINGS = [Natural(), Strided(4)]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(cross_fitting, "PART", PART)


def text():
    """Parts in turn of two kinds, which have no n-gram in common."""
    torch.manual_seed(0)
    kinds = torch.tensor([[0, 1], [2, 3]])
    return torch.cat([kinds[n % 2][torch.randint(2, (PART,))] for n in range(4)])


def half(number):
    return [part for n, part in enumerate(text().split(PART)) if n % 2 == number]


def ngrams_of(chunks):
    ngrams = NGrams(K, ORDER)
    ngrams.count(chunks)
    return ngrams


def counted(chunks):
    expert = NGramExpert(K, ORDER)
    for part in (expert.ngrams, expert.cross_fit):
        part.count(copy.copy(chunks))
    return expert


@pytest.mark.parametrize("size", [1, 7, PART, 3 * PART])
def test_each_half_predicts_the_other_however_the_text_is_cut(size):
    fit = CrossFit(K, ORDER)
    fit.count(iter(text().split(size)))
    assert fit.num_counted == len(text())
    y = torch.stack([text()[begin : begin + 10] for begin in (0, PART, 2 * PART + 5, 3 * PART)])
    halves = zip(fit.of_others(y), ([0, 2], [1, 3]), (1, 0), strict=True)
    for (rows, ngrams), examples, other in halves:
        assert rows.tolist() == examples
        torch.testing.assert_close(ngrams.keys, ngrams_of(half(other)).keys)
        torch.testing.assert_close(ngrams.counts, ngrams_of(half(other)).counts)


@pytest.mark.parametrize("ordering", ORDERINGS, ids=str)
def test_in_training_terms_are_those_of_the_other_half(ordering):
    expert = counted([text()])
    y = torch.stack([text()[begin : begin + 12] for begin in (0, PART, 2 * PART, 5)])
    levels = ordering.levels(12)
    terms = expert.num_terms(levels)
    with leave_one_out():
        found = expert(y, levels, num_terms=terms)
        some = torch.tensor([1, 4, 11])
        torch.testing.assert_close(expert(y, levels, some, num_terms=terms), found[:, some])
        mask = torch.rand(y.shape) < 0.5
        torch.testing.assert_close(expert(y, levels, mask, num_terms=terms), found[mask])
    for row, other in ((0, 1), (1, 0), (2, 1), (3, 1)):
        alone = NGramExpert(K, ORDER)
        alone.ngrams.count(half(other))
        torch.testing.assert_close(found[[row]], alone(y[[row]], levels, num_terms=terms))


def test_what_was_not_counted_is_scored_by_all():
    expert, plain = counted([text()]), NGramExpert(K, ORDER)
    plain.ngrams.count([text()])
    y, levels = torch.randint(K, (3, 8)), torch.arange(8)
    expected = plain(y, levels, num_terms=1)
    torch.testing.assert_close(expert(y, levels, num_terms=1), expected)
    with leave_one_out():
        torch.testing.assert_close(expert.eval()(y, levels, num_terms=1), expected)


def test_a_short_text_has_no_halves_and_leaves_one_out():
    chunk = text()[: PART - 1]
    expert, plain = counted([chunk]), NGramExpert(K, ORDER)
    plain.ngrams.count([chunk])
    assert expert.cross_fit.of_others(chunk[None, :8]) == []
    with leave_one_out():
        levels = torch.arange(8)
        found = expert(chunk[None, :8], levels, num_terms=1)
        torch.testing.assert_close(found, plain(chunk[None, :8], levels, num_terms=1))


def test_events_stay_whole():
    fit = CrossFit(K, ORDER)
    events = text().view(20, 10)
    fit.count(events.split(5))
    (_, other), (_, one) = fit.of_others(events[:1])
    torch.testing.assert_close(one.counts, ngrams_of([events[:5], events[10:15]]).counts)
    torch.testing.assert_close(other.counts, ngrams_of([events[5:10], events[15:]]).counts)


def test_the_halves_enter_no_checkpoint():
    assert not [name for name in counted([text()]).state_dict() if "cross_fit" in name]
