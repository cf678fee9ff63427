"""The n-gram expert: what it says of dimensions under orderings, against brute force."""

import copy
import itertools
import math
import pickle
from collections import Counter

import pytest
import torch

from dflows.experts import leave_one_out
from dflows.ngrams import NGramExpert, expert
from dflows.ngrams.messages import MOST_CLASSES
from dflows.orderings import (
    BehindContext,
    Blocks,
    Checkerboard,
    Natural,
    Strided,
)
from tests.dflows import small
from tests.dflows.small import markov, states

K, LENGTH = 3, 5

ORDERINGS = {
    **small.ORDERINGS,
    "checkerboard": Checkerboard(columns=3),
    "behind-context": BehindContext(Strided(columns=3)),
    "one-level": BehindContext(Blocks(size=LENGTH)),
}
over_orderings = pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)


def counted(num_classes=K, order=3, size=200, **options):
    expert = NGramExpert(num_classes, order, **options).eval()
    expert.ngrams.count([markov(size, num_classes)])
    return expert


def terms_of(expert, y, ordering, dimensions=None):
    levels = ordering.levels(y.shape[1])
    return expert(y, levels, dimensions, num_terms=expert.num_terms(levels))


def events():
    return torch.cat([markov(200, K)[: 10 * LENGTH].view(-1, LENGTH), states(K, LENGTH)[::17]])


class TestTerms:
    @pytest.mark.parametrize("order", [1, 2, 4])
    @pytest.mark.parametrize("left_out", [False, True])
    @over_orderings
    def test_the_first_is_what_n_grams_say_after_the_run_of_known_values(
        self, ordering, order, left_out
    ):
        expert, y, levels = counted(order=order), events(), ordering.levels(LENGTH)
        with leave_one_out(left_out):
            found = terms_of(expert, y, ordering)[..., 0]
        torch.testing.assert_close(found.exp().sum(-1), torch.ones_like(found[..., 0]))
        for d in range(LENGTH):
            seen = 0
            while seen < min(d, order - 1) and levels[d - seen - 1] < levels[d]:
                seen += 1
            history = expert.ngrams.pack(y)[:, d]
            own = y[:, d] if left_out else None
            expected = expert.ngrams.next_probs(history, torch.tensor(seen).expand(len(y)), own)
            torch.testing.assert_close(found[:, d], expected.log())

    def test_only_a_run_of_known_values_counts(self):
        expert = counted(order=4)
        assert expert._neighbours(Strided(columns=3).levels(LENGTH)).runs.tolist() == [
            0,
            1,
            2,
            0,
            1,
        ]

    @over_orderings
    def test_they_depend_on_lower_levels_only(self, ordering):
        expert, levels = counted(), ordering.levels(LENGTH)
        y = states(K, LENGTH)[::3]
        found = terms_of(expert, y, ordering)
        for source in range(LENGTH):
            changed = y.clone()
            changed[:, source] = (changed[:, source] + 1) % K
            seen = (terms_of(expert, changed, ordering) != found).any(-1).any(-1).any(0)
            assert not (seen & (levels <= levels[source])).any()
            # What stands right before is always used.
            if source + 1 < LENGTH and levels[source] < levels[source + 1]:
                assert seen[source + 1]

    @pytest.mark.parametrize("left_out", [False, True])
    @over_orderings
    def test_those_of_some_dimensions_are_those_of_all(self, ordering, left_out):
        expert, y = counted(), events()
        mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        with leave_one_out(left_out):
            found = terms_of(expert, y, ordering)
            numbers = torch.tensor([3, 0, 4])
            assert torch.equal(terms_of(expert, y, ordering, numbers), found[:, numbers])
            assert torch.equal(terms_of(expert, y, ordering, mask), found[mask])

    @over_orderings
    def test_a_shorter_event_has_as_many_and_those_it_lacks_are_0(self, ordering):
        expert, y = counted(), events()
        num_terms = expert.num_terms(ordering.levels(LENGTH))
        for length in range(1, LENGTH):
            levels = ordering.levels(length)
            found = expert(y[:, :length], levels, num_terms=num_terms)
            assert found.shape == (len(y), length, K, num_terms)
            own = expert.num_terms(levels)
            expected = expert(y[:, :length], levels, num_terms=own)
            torch.testing.assert_close(found[..., :own], expected)
            assert (found[..., own:] == 0).all()

    def test_of_many_classes_there_is_no_table(self):
        levels = Strided(3).levels(6)
        few, many = (NGramExpert(k, 3) for k in (MOST_CLASSES, MOST_CLASSES + 1))
        assert (few.num_terms(levels), many.num_terms(levels)) == (2, 1)
        y = torch.zeros(2, 6, dtype=torch.long)
        assert many(y, levels, num_terms=1).shape == (2, 6, MOST_CLASSES + 1, 1)

    def test_before_it_is_counted_it_is_uniform(self):
        found = terms_of(NGramExpert(K, 3), events(), Natural())
        torch.testing.assert_close(found, torch.full_like(found, -math.log(K)))


class TestBothSides:
    def test_they_are_bayes_theorem(self):
        """With a chain of second order and all neighbours known, nothing is missing."""
        generator = torch.Generator().manual_seed(1)
        expert = NGramExpert(K, 3)
        expert.ngrams.count([torch.randint(K, (200,), generator=generator)])
        y = torch.randint(K, (1, 6), generator=generator)
        d = 2  # the last of the first row: all but itself and the last of the second are known
        joint = torch.zeros(K, dtype=torch.double)
        for value in range(K):
            row = y.clone()
            row[0, d] = value
            joint[value] = expert.ngrams.log_prob(row)[0, : d + 3].sum()
        found = terms_of(expert, y, Strided(3))[0, d].sum(-1).log_softmax(-1)
        torch.testing.assert_close(found, joint.log_softmax(-1), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("place", range(0, 90, 7))
    def test_what_was_counted_is_left_out_of_them(self, place):
        """Of the sum over what may be between, the term of what did follow is without itself."""
        expert, text = counted(order=4), markov(200, K)
        ngrams, y = expert.ngrams, text[None, place : place + 6]

        def trigram(*classes, own=False):
            history = ngrams.pack(torch.tensor([classes]))[:, 2]
            left_out = torch.tensor(classes[2:]) if own else None
            return ngrams.next_probs(history, 2, left_out)[0, classes[2]]

        with leave_one_out(True):
            found = terms_of(expert, y, Strided(3))[0].sum(-1)
        history = ngrams.pack(y)[0]
        x, v, w, a, b = y[0, :5].tolist()
        for d, seen, own in ((1, 1, v), (2, 2, w)):
            left = ngrams.next_probs(history[d : d + 1], seen, torch.tensor([own]))[0]
            right = torch.zeros(K, dtype=torch.double)
            for value in range(K):
                if d == 1:
                    right[value] = sum(
                        trigram(x, value, between, own=(value, between) == (v, w))
                        * trigram(value, between, a, own=(value, between) == (v, w))
                        for between in range(K)
                    )
                else:
                    right[value] = trigram(v, value, a, own=value == w) * trigram(
                        value, a, b, own=value == w
                    )
            torch.testing.assert_close(found[d], (left * right).log(), rtol=1e-4, atol=1e-4)


class TestLeaveOneOut:
    def test_it_equals_counting_again_without_the_occurrence(self):
        """Bigrams with a fixed discount, from counts in dictionaries."""
        text, discount = markov(60, K, seed=3).tolist(), 0.4
        expert = NGramExpert(K, 2, discount).train()
        expert.ngrams.count([torch.tensor(text)])
        y = torch.tensor([text])
        with leave_one_out():
            found = terms_of(expert, y, Natural())[0, :, :, 0].exp()

        def smoothed(counts, lower):
            total = sum(counts)
            if not total:
                return lower
            rest = sum(discount for count in counts if count) / total
            taken = [max(count - discount, 0) / total for count in counts]
            return [share + rest * prob for share, prob in zip(taken, lower, strict=True)]

        for place in range(1, len(text)):
            pairs = Counter(itertools.pairwise(text))
            pairs[text[place - 1], text[place]] -= 1
            follows = [sum(pairs[v, w] > 0 for v in range(K)) for w in range(K)]
            lower = smoothed(follows, [1 / K] * K)
            expected = smoothed([pairs[text[place - 1], w] for w in range(K)], lower)
            torch.testing.assert_close(found[place].tolist(), expected)

    @pytest.mark.parametrize("training", [False, True])
    def test_by_default_it_is_done_in_training_mode(self, training):
        expert, y = counted().train(training), events()
        whole = terms_of(expert, y, Strided(3))
        with leave_one_out():
            assert torch.equal(terms_of(expert, y, Strided(3)), whole) is not training
        assert torch.equal(terms_of(expert, y, Strided(3)), whole)


class TestModule:
    def test_it_has_counts_and_no_parameters(self):
        expert = counted()
        assert not [*expert.parameters()]
        assert {*expert.state_dict()} == {"ngrams.keys", "ngrams.counts", "ngrams.sizes"}
        other, y = NGramExpert(K, 3), events()
        other.load_state_dict(expert.state_dict())
        assert torch.equal(terms_of(other, y, Strided(3)), terms_of(expert, y, Strided(3)))

    def test_its_precision_is_its_own(self):
        expert, y = counted(), events()
        expected = terms_of(expert, y, Strided(3))
        assert expected.dtype == torch.double
        assert torch.equal(terms_of(expert.bfloat16(), y, Strided(3)), expected)

    def test_it_is_copied_after_use(self):
        expert, y = counted(), events()
        expected = terms_of(expert, y, Strided(3))
        for other in (copy.deepcopy(expert), pickle.loads(pickle.dumps(expert))):
            assert torch.equal(terms_of(other, y, Strided(3)), expected)

    def test_levels_are_worked_out_once_and_inference_leaves_them_usable(self):
        expert, y, levels = counted(), events(), Strided(3).levels(LENGTH)
        with torch.inference_mode():
            expert(y, levels, num_terms=2)
        assert expert._neighbours(levels) is expert._neighbours(levels)
        terms = expert(y, levels, num_terms=2)
        weight = torch.ones(2, requires_grad=True)
        (terms.float() * weight).sum().backward()


@over_orderings
def test_few_dimensions_are_looked_up_as_many_are(ordering, monkeypatch):
    expert_, y = counted(order=4), events()
    found = terms_of(expert_, y, ordering, torch.tensor([1, 4]))
    monkeypatch.setattr(expert, "FEW", 0)
    torch.testing.assert_close(terms_of(expert_, y, ordering, torch.tensor([1, 4])), found)
    torch.testing.assert_close(terms_of(expert_, y, ordering)[:, [1, 4]], found)
