"""Counted n-grams: against Kneser-Ney in words, and against counts without an occurrence."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflows.errors import UserError
from dflows.ngrams import NGrams
from tests.dflows.small import markov, states

ONE = torch.tensor(1.0, dtype=torch.double)


class Reference:
    """Kneser-Ney in words: dictionaries of tuples, one n-gram at a time."""

    def __init__(self, text, num_classes, order, discount=None):
        self.num_classes, self.order, self.discount = num_classes, order, discount
        self.occurrences = Counter(
            tuple(text[i : i + m]) for m in range(1, order + 1) for i in range(len(text) - m + 1)
        )
        self.followed = Counter(ngram[1:] for ngram in self.occurrences if len(ngram) > 1)

    def discounts(self, counts, m):
        if self.discount is not None:
            return [0, *[self.discount] * 3]
        n = [sum(c == k for ngram, c in counts.items() if len(ngram) == m) for k in (1, 2, 3, 4)]
        if not all(n):
            return [0, 0.5, 1.0, 1.5]
        y = n[0] / (n[0] + 2 * n[1])
        found = [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)]
        return [0, *(found if all(0 < d < k for k, d in enumerate(found, 1)) else [0.5, 1.0, 1.5])]

    def prob(self, word, context, top=True):
        counts = self.occurrences if top else self.followed
        m = len(context) + 1
        lower = self.prob(word, context[1:], top=False) if m > 1 else 1 / self.num_classes
        discount = self.discounts(counts, m)
        after = [counts[(*context, w)] for w in range(self.num_classes)]
        if not sum(after):
            return lower
        own = after[word] - discount[min(after[word], 3)]
        return (own + sum(discount[min(c, 3)] for c in after) * lower) / sum(after)

    def log_prob(self, row):
        begins = [max(0, i - self.order + 1) for i in range(len(row))]
        return [
            math.log(self.prob(w, tuple(row[b:i])))
            for i, (w, b) in enumerate(zip(row, begins, strict=True))
        ]


class TestLogProb:
    @pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
    @pytest.mark.parametrize("discount", [None, 0.3, 0.9])
    @pytest.mark.parametrize("size", [1, 3, 40, 2000])
    def test_it_is_kneser_ney(self, order, discount, size):
        text = markov(size, 4)
        ngrams = NGrams(4, order, discount)
        ngrams.count([text])
        reference = Reference(text.tolist(), 4, order, discount)
        rows = torch.cat([states(4, 6)[::97], text[: size // 6 * 6].view(-1, 6)[:20]])
        expected = [reference.log_prob(row) for row in rows.tolist()]
        torch.testing.assert_close(
            ngrams.log_prob(rows), torch.tensor(expected, dtype=torch.double)
        )

    @given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.integers(0, 255))
    def test_eight_of_256_classes_fill_64_bits(self, text, other):
        ngrams = NGrams(256, 8)
        ngrams.count([torch.tensor(text)])
        row = (text * 12)[:11]
        rows = torch.tensor([[*row, w] for w in range(256)])
        torch.testing.assert_close(ngrams.log_prob(rows)[:, -1].exp().sum(), ONE)
        expected = Reference(text, 256, 8, None).log_prob([*row, other])
        torch.testing.assert_close(
            ngrams.log_prob(torch.tensor([[*row, other]]))[0],
            torch.tensor(expected, dtype=torch.double),
        )


class TestNextProbs:
    @pytest.mark.parametrize("order", [1, 2, 4])
    def test_it_is_what_events_of_every_beginning_are_scored_by(self, order):
        ngrams, x = NGrams(3, order), states(3, 5)
        ngrams.count([markov(200, 3)])
        seen = torch.arange(5).expand_as(x)
        probs = ngrams.next_probs(ngrams.pack(x).flatten(), seen.flatten()).reshape(*x.shape, 3)
        torch.testing.assert_close(probs.sum(dim=-1), torch.ones_like(probs[..., 0]))
        found = probs.gather(-1, x.unsqueeze(-1)).squeeze(-1).log()
        torch.testing.assert_close(found, ngrams.log_prob(x))

    def test_no_more_is_used_than_was_seen(self):
        ngrams, x = NGrams(3, 4), states(3, 4)
        ngrams.count([markov(200, 3)])
        for seen in range(4):
            probs = ngrams.next_probs(ngrams.pack(x)[:, 3], torch.full((len(x),), seen))
            expected = ngrams.log_prob(x[:, 3 - seen :])[:, -1].exp()
            torch.testing.assert_close(probs.gather(1, x[:, 3:])[:, 0], expected)

    @pytest.mark.parametrize("order", [1, 2, 3, 5])
    @pytest.mark.parametrize("size", [2, 30, 400])
    def test_an_occurrence_is_left_out_as_though_it_had_not_been_counted(self, order, size):
        text = markov(size, 3, seed=order).tolist()
        ngrams = NGrams(3, order, discount=0.6)
        ngrams.count([torch.tensor(text)])
        whole = torch.tensor(text)[None]
        for place in range(size - min(size, 20), size):
            for seen in {0, 1, min(place, order - 1)} - {n for n in (0, 1) if n > place}:
                reference = Reference(text, 3, order, discount=0.6)
                for known in range(min(seen, order - 1) + 1):
                    reference.occurrences[tuple(text[place - known : place + 1])] -= 1
                kept = [ngram for ngram, count in reference.occurrences.items() if count > 0]
                reference.followed = Counter(ngram[1:] for ngram in kept if len(ngram) > 1)
                context = tuple(text[place - min(seen, order - 1) : place])
                expected = [reference.prob(word, context) for word in range(3)]
                history, own = ngrams.pack(whole)[:, place], whole[:, place]
                found = ngrams.next_probs(history, torch.tensor([seen]), own)[0]
                torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double))

    def test_what_was_not_counted_is_not_left_out(self):
        ngrams = NGrams(4, 3)
        ngrams.count([torch.tensor([0, 1, 2, 0, 1, 2, 0])])
        history, seen, own = (torch.tensor([value]) for value in (1, 0, 3))
        torch.testing.assert_close(
            ngrams.next_probs(history, seen, own), ngrams.next_probs(history, seen)
        )

    def test_left_out_probabilities_sum_to_1(self):
        ngrams, text = NGrams(4, 4), markov(300, 4)
        ngrams.count([text])
        seen = torch.arange(300)
        probs = ngrams.next_probs(ngrams.pack(text[None])[0], seen, text)
        torch.testing.assert_close(probs.sum(dim=-1), torch.ones(300, dtype=torch.double))
        assert (probs > 0).all()


class TestCount:
    @given(st.data())
    def test_how_a_text_is_cut_changes_nothing(self, data):
        text = markov(90, 3, seed=2)
        cuts = sorted(data.draw(st.lists(st.integers(0, 90), max_size=12)))
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 90], strict=True)]
        order = data.draw(st.integers(1, 6))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "dflows.ngrams.counts.BLOCK", data.draw(st.sampled_from([1, 2, 7, 50, 1000]))
            )
            ngrams = NGrams(3, order)
            ngrams.count(iter(chunks))
        whole = NGrams(3, order)
        whole.count([text.numpy().astype(np.uint8)])
        assert ngrams.num_counted == 90
        for name, values in whole.state_dict().items():
            assert torch.equal(ngrams.state_dict()[name], values), name

    def test_occurrences_are_those_of_the_text(self):
        text = markov(300, 3, seed=3).tolist()
        ngrams = NGrams(3, 3)
        ngrams.count([torch.tensor(text)])
        sizes = ngrams.sizes.tolist()
        found = {
            (key >> 4, key >> 2 & 3, key & 3): count
            for key, count in zip(
                ngrams.keys.split(sizes)[2].tolist(),
                ngrams.counts.split(sizes)[2].tolist(),
                strict=True,
            )
        }
        assert found == Counter(tuple(text[i : i + 3]) for i in range(298))

    def test_events_do_not_go_on_in_one_another(self):
        rows = torch.tensor([[0, 1], [2, 0]])
        apart, one = (NGrams(3, 2) for _ in range(2))
        apart.count([rows])
        one.count([rows.flatten()])
        assert apart.sizes.tolist() == [3, 2]
        assert one.sizes.tolist() == [3, 3]
        again = NGrams(3, 2)
        again.count(rows.split(1))
        assert torch.equal(again.keys, apart.keys)
        apart.count([torch.tensor([[1]])])  # anew, and of events that have no n-gram of order 2
        assert apart.sizes.tolist() == [1, 0]
        torch.testing.assert_close(apart.log_prob(states(3, 2)).sum(-1).exp().sum(), ONE)

    def test_a_longer_order_tells_a_text_better(self):
        text = markov(20_000, 4, seed=4)
        bits = []
        for order in (1, 2, 3):
            ngrams = NGrams(4, order)
            ngrams.count([text[:-4000]])
            bits.append(-ngrams.log_prob(text[None, -4000:]).mean().item())
        assert bits[0] > bits[1] + 0.05 > bits[2] + 0.1

    @pytest.mark.parametrize("chunks", [[], [torch.empty(0)], [torch.empty(0, 3)]])
    def test_nothing_cannot_be_counted(self, chunks):
        with pytest.raises(UserError, match="nothing to count"):
            NGrams(3).count(chunks)

    @pytest.mark.parametrize("value", [-1, 3])
    def test_values_are_classes(self, value):
        with pytest.raises(UserError, match=rf"{value} lies outside 0\.\.2"):
            NGrams(3).count([torch.tensor([0, value])])


class TestModule:
    def test_inference_leaves_what_can_be_loaded(self):
        ngrams = NGrams(4, 3)
        with torch.inference_mode():
            ngrams.count([markov(60, 4)])
            ngrams.log_prob(states(4, 4))
        assert not ngrams.keys.is_inference()
        other = NGrams(4, 3)
        other.load_state_dict(ngrams.state_dict())
        assert torch.equal(other.log_prob(states(4, 4)), ngrams.log_prob(states(4, 4)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"order": 0}, "order is 0: give 1 to 8"),
            ({"order": 9}, "order is 9: give 1 to 8"),
            ({"discount": 0.0}, "between 0 and 1"),
            ({"discount": 1.0}, "between 0 and 1"),
        ],
    )
    def test_bad_options_are_refused(self, options, message):
        with pytest.raises(UserError, match=message):
            NGrams(200, **options)
