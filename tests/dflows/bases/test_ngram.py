import copy
import math

import pytest
import torch

from dflows import DiscreteFlow
from dflows.bases import NGramBase
from dflows.checks import check_flow
from dflows.errors import UserError
from dflows.representations import to_one_hot
from dflows.transforms import PermutationTransform
from tests.dflows.small import markov, states

ONE = torch.tensor(1.0, dtype=torch.double)


def counted(num_classes=4, length=4, order=3, *, size=60, **options):
    base = NGramBase(num_classes, length, order=order, **options)
    base.count([markov(size, num_classes)])
    return base


class TestLogProb:
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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_one_hot_vectors_are_scored_as_their_indices(self, dtype):
        base, x = counted(4, 5), states(4, 5)
        found = base.log_prob(to_one_hot(x, 4, dtype))
        assert found.dtype == torch.double
        assert torch.equal(found, base.log_prob(x))
        assert not base.differentiable

    def test_of_improbable_classes_there_is_no_nan(self):
        base = NGramBase(4, 3, order=2, discount=1e-300)
        base.count([torch.zeros(50, dtype=torch.long)])
        x = states(4, 3)
        for value in (x, to_one_hot(x, 4)):
            log_prob = base.log_prob(value)
            assert not log_prob.isnan().any()
            assert (log_prob[x != 0] < -600).all()

    def test_before_it_is_counted_it_is_uniform(self):
        base = NGramBase(5, 4)
        base.init_from_counts(torch.arange(5))
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

    @pytest.mark.parametrize("temperature", [0.7, 1.0])
    def test_a_prefix_is_kept_and_conditioned_on(self, temperature):
        base = counted(4, 6)
        noise = base.noise(50, 6, torch.Generator().manual_seed(0))
        whole, passes = base.from_noise(noise, temperature=temperature)
        assert passes == 0
        for known in range(7):
            assert base.supports_prefix(known, 6)
            prefix = whole[:, :known]
            again, _ = base.from_noise(noise, temperature=temperature, prefix=prefix)
            assert torch.equal(again, whole)
        other, _ = base.from_noise(noise, prefix=torch.full((50, 2), 3))
        assert (other[:, :2] == 3).all()
        assert not torch.equal(other[:, 2:], whole[:, 2:])

    def test_the_ends_of_the_noise_are_classes(self):
        base = counted(4, 6)
        ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.double).expand(2, 6)
        assert base.from_noise(ends)[0].tolist() == [[0] * 6, [3] * 6]

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

    def test_repr_and_passes(self):
        base = counted(size=3, order=2)
        assert "NGrams(num_classes=4, order=2, ngrams=" in repr(base)
        assert base.passes == 0
        assert not [*base.parameters()]


class TestUnderAFlow:
    def test_it_is_normalized_and_sampled(self):
        base = counted(3, 4)
        flow = DiscreteFlow(base, [PermutationTransform([1, 0, 3, 2])])
        y = states(3, 4)
        torch.testing.assert_close(flow.log_prob(y).exp().sum(), ONE)
        expected = base.log_prob(y[:, [1, 0, 3, 2]]).sum(-1)
        torch.testing.assert_close(flow.log_prob(y), expected)
        assert flow.sample((5,)).shape == (5, 4)

    def test_alone_it_is_a_flow_too(self):
        flow = DiscreteFlow(counted(3, 4))
        check_flow(flow)
        torch.testing.assert_close(flow().log_prob(states(3, 4)).exp().sum(), ONE)
        with pytest.raises(UserError, match="takes a search"):
            _ = flow().mode
