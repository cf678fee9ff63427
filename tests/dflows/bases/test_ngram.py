import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflows import DiscreteFlow
from dflows.bases import NGramBase
from dflows.bases import ngram as module
from dflows.checks import check_flow
from dflows.errors import UserError
from dflows.representations import to_one_hot
from tests.dflows.small import make_flow, states

ONE = torch.tensor(1.0, dtype=torch.double)


def markov(size, num_classes, seed=0):
    """A text in which what comes next depends on two before it, and its rare classes are rare."""
    draw = np.random.default_rng(seed)
    table = draw.dirichlet(np.full(num_classes, 0.2), (num_classes, num_classes))
    text = [0, 0]
    for _ in range(size):
        text.append(draw.choice(num_classes, p=table[text[-2], text[-1]]))
    return torch.tensor(text[2:])


def counted(num_classes=4, length=4, order=3, *, size=60, **options):
    base = NGramBase(num_classes, length, order=order, **options)
    base.count([markov(size, num_classes)])
    return base


class Reference:
    """Kneser-Ney in words: dictionaries of tuples, one gram at a time."""

    def __init__(self, text, num_classes, order, discount):
        self.num_classes, self.order, self.discount = num_classes, order, discount
        self.occurrences = Counter(
            tuple(text[i : i + m]) for m in range(1, order + 1) for i in range(len(text) - m + 1)
        )
        self.followed = Counter(gram[1:] for gram in self.occurrences if len(gram) > 1)

    def discounts(self, counts, m):
        if self.discount is not None:
            return [0, *[self.discount] * 3]
        n = [sum(c == k for gram, c in counts.items() if len(gram) == m) for k in (1, 2, 3, 4)]
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
        base = NGramBase(4, 6, order=order, discount=discount)
        base.count([text])
        reference = Reference(text.tolist(), 4, order, discount)
        rows = torch.cat([states(4, 6)[::97], text[: size // 6 * 6].view(-1, 6)[:20]])
        expected = [reference.log_prob(row) for row in rows.tolist()]
        torch.testing.assert_close(base.log_prob(rows), torch.tensor(expected, dtype=torch.double))

    @pytest.mark.parametrize("order", range(1, 9))
    @pytest.mark.parametrize(("num_classes", "length"), [(2, 9), (3, 4), (5, 3)])
    @pytest.mark.parametrize("size", [0, 5, 200])
    def test_probabilities_sum_to_1(self, order, num_classes, length, size):
        base = NGramBase(num_classes, length, order=order)
        if size:
            base.count([markov(size, num_classes)])
        for shorter in range(1, length + 1):
            log_prob = base.log_prob(states(num_classes, shorter))
            torch.testing.assert_close(log_prob.sum(-1).exp().sum(), ONE)
        # After every context, those that were never seen among them.
        following = log_prob[:, -1].exp().reshape(-1, num_classes).sum(-1)
        torch.testing.assert_close(following, torch.ones_like(following))
        assert log_prob.isfinite().all()

    @given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.integers(0, 255))
    def test_eight_of_256_classes_fill_64_bits(self, text, other):
        base = NGramBase(256, 12, order=8)
        base.count([torch.tensor(text)])
        row = (text * 12)[:11]
        rows = torch.tensor([[*row, w] for w in range(256)])
        torch.testing.assert_close(base.log_prob(rows)[:, -1].exp().sum(), ONE)
        expected = Reference(text, 256, 8, None).log_prob([*row, other])
        torch.testing.assert_close(
            base.log_prob(torch.tensor([[*row, other]]))[0],
            torch.tensor(expected, dtype=torch.double),
        )
        one_hot = to_one_hot(rows[:3], 256, torch.double)
        torch.testing.assert_close(base.log_prob(one_hot), base.log_prob(rows[:3]))

    def test_one_hot_vectors_have_the_same(self):
        base, x = counted(4, 5), states(4, 5)
        one_hot = to_one_hot(x, 4, torch.double)
        torch.testing.assert_close(base.log_prob(one_hot), base.log_prob(x))
        torch.testing.assert_close(base.objective(x), base.log_prob(x).sum(-1))

    def test_before_it_is_counted_it_is_uniform(self):
        base = NGramBase(5, 4)
        base.start(torch.arange(5))
        assert base.num_counted == 0
        expected = torch.full((3, 4), -math.log(5), dtype=torch.double)
        torch.testing.assert_close(base.log_prob(torch.randint(5, (3, 4))), expected)
        assert base.sample(200, 4).unique().tolist() == list(range(5))

    def test_a_text_as_one_event_carries_its_context(self):
        base, text = counted(4, 4, order=3), markov(50, 4, seed=1)
        whole = base.log_prob(text[None])[0]
        windows = base.log_prob(text.view(-1, 10))
        torch.testing.assert_close(whole.view(-1, 10)[:, 2:], windows[:, 2:])
        assert not torch.allclose(whole.view(-1, 10)[1:, :2], windows[1:, :2])


class TestCount:
    @given(st.data())
    def test_how_a_text_is_cut_changes_nothing(self, data):
        text = markov(90, 3, seed=2)
        cuts = sorted(data.draw(st.lists(st.integers(0, 90), max_size=12)))
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 90], strict=True)]
        order = data.draw(st.integers(1, 6))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "BLOCK", data.draw(st.sampled_from([1, 2, 7, 50, 1000])))
            base = NGramBase(3, 4, order=order)
            base.count(iter(chunks))
        whole = NGramBase(3, 4, order=order)
        whole.count([text.numpy().astype(np.uint8)])
        assert base.num_counted == 90
        for name, values in whole.state_dict().items():
            assert torch.equal(base.state_dict()[name], values), name

    def test_occurrences_are_those_of_the_text(self):
        text = markov(300, 3, seed=3).tolist()
        base = NGramBase(3, 4, order=3)
        base.count([torch.tensor(text)])
        expected = Counter(tuple(text[i : i + 3]) for i in range(298))
        grams = base.keys.split(base.sizes.tolist())[2]
        counts = base.counts.split(base.sizes.tolist())[2]
        found = {
            (g >> 4, g >> 2 & 3, g & 3): c
            for g, c in zip(grams.tolist(), counts.tolist(), strict=True)
        }
        assert found == expected

    def test_events_do_not_go_on_in_one_another(self):
        rows = torch.tensor([[0, 1], [2, 0]])
        apart, one = (NGramBase(3, 2, order=2) for _ in range(2))
        apart.count([rows])
        one.count([rows.flatten()])
        assert apart.sizes.tolist() == [3, 2]
        assert one.sizes.tolist() == [3, 3]
        again = NGramBase(3, 2, order=2)
        again.count(rows.split(1))
        assert torch.equal(again.keys, apart.keys)
        apart.count([torch.tensor([[1]])])  # anew, and of events that have no gram of order 2
        assert apart.sizes.tolist() == [1, 0]
        torch.testing.assert_close(apart.log_prob(states(3, 2)).sum(-1).exp().sum(), ONE)

    def test_a_longer_order_tells_a_text_better(self):
        text = markov(20_000, 4, seed=4)
        bits = []
        for order in (1, 2, 3):
            base = NGramBase(4, 8, order=order)
            base.count([text[:-4000]])
            bits.append(-base.log_prob(text[None, -4000:]).mean().item())
        assert bits[0] > bits[1] + 0.05 > bits[2] + 0.1

    @pytest.mark.parametrize("chunks", [[], [torch.empty(0)], [torch.empty(0, 3)]])
    def test_nothing_cannot_be_counted(self, chunks):
        with pytest.raises(UserError, match="nothing to count"):
            NGramBase(3, 4).count(chunks)

    @pytest.mark.parametrize("value", [-1, 3])
    def test_values_are_classes(self, value):
        with pytest.raises(UserError, match=rf"{value} lies outside 0\.\.2"):
            NGramBase(3, 4).count([torch.tensor([0, value])])


class TestSample:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize("order", [1, 2, 3])
    def test_frequencies_are_the_probabilities(self, order, temperature):
        base, x = counted(3, 4, order, size=40), states(3, 3)
        samples = base.sample(
            40_000, 3, temperature=temperature, generator=torch.Generator().manual_seed(0)
        )
        # The temperature is that of every dimension's distribution.
        after = torch.stack(
            [
                torch.stack(
                    [
                        base.log_prob(torch.cat([x[:, :d], w.expand(27, 1)], 1))[:, d]
                        for w in torch.arange(3)
                    ],
                    -1,
                )
                for d in range(3)
            ],
            dim=1,
        )
        log_probs = (after / temperature).log_softmax(-1)
        probs = log_probs.gather(-1, x.unsqueeze(-1)).sum((-1, -2)).exp()
        observed = (samples * torch.tensor([9, 3, 1])).sum(-1).bincount(minlength=27)
        expected = len(samples) * probs
        # The 0.999 quantile of chi-square with 26 degrees of freedom.
        assert ((observed - expected) ** 2 / expected).sum() < 54.1

    def test_a_generator_decides(self):
        base = counted(4, 12, 4)
        one, two, fixed = (
            base.sample(20, 12, generator=torch.Generator().manual_seed(1), fixed_point=fixed_point)
            for fixed_point in (False, False, True)
        )
        assert one.dtype == torch.long
        assert torch.equal(one, two)
        assert torch.equal(one, fixed)
        assert not torch.equal(one, base.sample(20, 12))

    def test_greedy_takes_the_likeliest_of_every_dimension(self):
        base = counted(4, 6)
        row = base.greedy(2, 6)
        assert torch.equal(row[0], row[1])
        for d in range(6):
            others = row[:1].repeat(4, 1)
            others[:, d] = torch.arange(4)
            assert base.log_prob(others)[:, d].argmax() == row[0, d]
        assert not base.greedy_is_mode
        base = counted(3, 4, order=1)
        assert base.greedy_is_mode
        assert base.log_prob(states(3, 4)).sum(-1).max() == base.log_prob(base.greedy(1, 4)).sum()


class TestModule:
    def test_a_new_base_takes_its_state(self):
        base, x = counted(), states(4, 4)
        for other in (NGramBase(4, 4, order=3), counted(size=900)):
            other.log_prob(x)
            other.load_state_dict(base.state_dict())
            assert torch.equal(other.log_prob(x), base.log_prob(x))
            assert other.num_counted == 60
        assert torch.equal(copy.deepcopy(base).log_prob(x), base.log_prob(x))
        with pytest.raises(RuntimeError, match="size mismatch"):
            NGramBase(4, 4, order=4).load_state_dict(base.state_dict())

    def test_its_precision_is_its_own(self):
        base, x = counted(), states(4, 4)
        expected = base.log_prob(x)
        assert torch.equal(base.half().log_prob(x), expected)

    def test_inference_leaves_what_can_be_loaded(self):
        base = NGramBase(4, 4, order=3)
        with torch.inference_mode():
            base.count([markov(60, 4)])
            base.log_prob(states(4, 4))
        assert not base.keys.is_inference()
        base.load_state_dict(counted().state_dict())
        weight = torch.ones(256, 4, requires_grad=True)
        base.objective(states(4, 4), weight=weight).sum().backward()

    def test_repr_and_passes(self):
        base = counted(size=3, order=2)
        assert repr(base).startswith("NGramBase(num_classes=4, length=4, order=2, grams=")
        assert base.passes == 0
        assert not [*base.parameters()]

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
            NGramBase(200, 4, **options)


class TestUnderAFlow:
    def test_it_is_normalized_and_sampled(self):
        base = counted(3, 4)
        flow = make_flow(base=base)
        y = states(3, 4)
        torch.testing.assert_close(flow.log_prob(y).exp().sum(), ONE)
        check_flow(flow)
        assert flow.sample((5,)).shape == (5, 4)
        flow.objective(y).sum().backward()

    def test_alone_it_is_a_flow_too(self):
        flow = DiscreteFlow(counted(3, 4))
        check_flow(flow)
        torch.testing.assert_close(flow().log_prob(states(3, 4)).exp().sum(), ONE)
        with pytest.raises(UserError, match="takes a search"):
            _ = flow().mode

    @pytest.mark.parametrize("estimator", ["posterior", "straight-through", "local-then-joint"])
    def test_estimators_that_need_its_gradient_are_refused(self, estimator):
        with pytest.raises(UserError, match="NGramBase has none: give every flow LocalObjective"):
            make_flow(base=counted(3, 4), estimator=estimator)
