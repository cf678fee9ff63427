"""Draws by the inverse CDF: against exact sums, at the ends, in all precisions."""

from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflows.categorical import _never_falling, cdf, inverse_cdf, search_cdf, select_log_prob
from dflows.representations import to_one_hot

PRECISIONS = [torch.float32, torch.float64]
HALVES = [torch.float16, torch.bfloat16]


def last_below_1(dtype):
    return torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))


class TestInverseCDF:
    @given(
        st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any),
        st.lists(st.integers(0, 63), min_size=1, max_size=5),
    )
    def test_it_is_the_first_class_whose_cumulative_sum_exceeds_the_noise(self, weights, numbers):
        noise = torch.tensor(numbers, dtype=torch.double) / 64
        sums = [Fraction(total, sum(weights)) for total in accumulate(weights)]
        expected = [
            next(k for k, total in enumerate(sums) if total > Fraction(number, 64))
            for number in numbers
        ]
        probs = torch.tensor(weights, dtype=torch.double)
        assert inverse_cdf(noise, probs=probs).tolist() == expected
        rows = probs.expand(len(noise), -1)
        assert inverse_cdf(noise, probs=rows).tolist() == expected

    @pytest.mark.parametrize("dtype", PRECISIONS)
    @pytest.mark.parametrize("noise_dtype", PRECISIONS)
    @pytest.mark.parametrize("classes", [2, 27, 1000])
    def test_the_ends_of_the_noise_give_the_first_and_last_class(self, dtype, noise_dtype, classes):
        ends = torch.stack([torch.zeros((), dtype=noise_dtype), last_below_1(noise_dtype)])
        for _ in range(20):
            logits = torch.randn(2, classes, dtype=dtype)
            assert inverse_cdf(ends, logits=logits).tolist() == [0, classes - 1]
            assert inverse_cdf(ends, logits=logits[0]).tolist()[0] == 0

    @pytest.mark.parametrize("dtype", [*HALVES, *PRECISIONS])
    @pytest.mark.parametrize("noise_dtype", PRECISIONS)
    @pytest.mark.parametrize("shared", [False, True])
    def test_a_class_of_probability_0_is_never_drawn(self, dtype, noise_dtype, shared):
        generator = torch.Generator().manual_seed(0)
        for case in range(100):
            possible = torch.rand(30, generator=generator) < 0.3
            possible[case % 30] = True
            logits = torch.randn(30, generator=generator).masked_fill(~possible, -torch.inf)
            noise = torch.rand(50, dtype=noise_dtype, generator=generator)
            noise[0], noise[1] = 0, last_below_1(noise_dtype)
            logits = logits.to(dtype)
            drawn = inverse_cdf(noise, logits=logits if shared else logits.expand(50, -1))
            assert possible[drawn].all()
            first, last = possible.nonzero().flatten()[[0, -1]].tolist()
            assert drawn[0] == first
            assert drawn[1] == last

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision_loses_no_mass(self, dtype):
        logits = torch.zeros(256, dtype=dtype)
        noise = torch.arange(4096) / 4096
        drawn = inverse_cdf(noise, logits=logits)
        assert drawn.bincount(minlength=256).tolist() == [16] * 256
        rows = inverse_cdf(noise, logits=logits.expand(4096, -1))
        assert torch.equal(rows, drawn)

    def test_the_noise_decides_the_precision(self):
        edge = torch.tensor([0.5, 0.5 - 2**-40], dtype=torch.double)
        logits = torch.zeros(2)
        assert inverse_cdf(edge, logits=logits).tolist() == [1, 0]
        assert inverse_cdf(edge.float(), logits=logits).tolist() == [1, 1]

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_temperature_divides_log_probabilities(self, temperature):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(4, dtype=torch.double, generator=generator)
        noise = (torch.arange(100_000, dtype=torch.double) + 0.5) / 100_000
        expected = (logits / temperature).softmax(-1)
        for options in ({"logits": logits}, {"probs": logits.exp()}):
            drawn = inverse_cdf(noise, temperature=temperature, **options)
            frequencies = drawn.bincount(minlength=4) / 100_000
            torch.testing.assert_close(frequencies, expected.float(), rtol=0, atol=2e-5)

    @pytest.mark.parametrize("batch", [(), (5,), (3, 5)])
    @pytest.mark.parametrize("draws", [(), (7,), (2, 7)])
    def test_draws_share_a_distribution_along_the_first_dimensions_of_the_noise(self, batch, draws):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(*batch, 6, generator=generator)
        noise = torch.rand((*draws, *batch), generator=generator)
        found = inverse_cdf(noise, logits=logits)
        assert found.shape == noise.shape
        expected = inverse_cdf(noise, logits=logits.expand(*draws, *batch, 6))
        assert torch.equal(found, expected)

    def test_layouts_that_are_not_contiguous(self):
        noise, logits = torch.rand(6, 4), torch.randn(5, 4, 6)
        expected = inverse_cdf(noise.T.contiguous(), logits=logits.permute(1, 2, 0).contiguous())
        assert torch.equal(inverse_cdf(noise.T, logits=logits.permute(1, 2, 0)), expected)
        probs = torch.rand(5)
        expected = inverse_cdf(noise.T.contiguous(), probs=probs)
        assert torch.equal(inverse_cdf(noise.T, probs=probs), expected)

    @pytest.mark.parametrize("names", [(), ("logits", "probs")])
    def test_one_of_logits_and_probabilities_is_given(self, names):
        with pytest.raises(ValueError, match="either logits or probs"):
            inverse_cdf(torch.rand(3), **{name: torch.ones(2) for name in names})


def test_a_table_serves_noise_of_any_precision():
    table = cdf(torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0]))
    for dtype in PRECISIONS:
        noise = torch.tensor([0.0, 0.25, 0.7499, 0.75, last_below_1(dtype)], dtype=dtype)
        assert search_cdf(table, noise).tolist() == [0, 2, 2, 3, 3]


def test_sums_of_a_parallel_scan_are_mended():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0, 0.0])
    rounded = torch.tensor([0.01, 0.24, 0.26, 0.76, 0.75, 1.01, 0.99])
    table = _never_falling(rounded, probs)
    assert (table.diff() >= 0).all()
    noise = torch.linspace(0, last_below_1(torch.float32), 1000)
    assert search_cdf(table, noise).unique().tolist() == [1, 3]
    exact = probs.cumsum(-1)
    assert torch.equal(_never_falling(exact, probs), exact)


class TestSelectLogProb:
    def test_indices_and_one_hot_vectors_agree(self):
        log_probs = torch.randn(6, 4, 5).log_softmax(-1)
        x = torch.randint(5, (6, 4))
        found = select_log_prob(log_probs, x)
        torch.testing.assert_close(
            found.exp(), log_probs.exp()[torch.arange(6)[:, None], range(4), x]
        )
        torch.testing.assert_close(select_log_prob(log_probs, to_one_hot(x, 5)), found)

    def test_a_class_of_probability_0_is_minus_infinity_and_never_nan(self):
        log_probs = torch.tensor([0.0, -torch.inf, 0.0]).log_softmax(-1).expand(3, -1)
        x = torch.arange(3)
        one_hot = to_one_hot(x, 3).requires_grad_()
        found = select_log_prob(log_probs, one_hot)
        torch.testing.assert_close(found.detach(), select_log_prob(log_probs, x))
        assert found[1] == -torch.inf
        select_log_prob(log_probs[[0, 2]], one_hot[[0, 2]]).sum().backward()
        assert one_hot.grad.isfinite().all()
        assert (one_hot.grad[[0, 2], 1] < -80).all()  # no rule is drawn to it

    def test_the_gradient_of_one_hot_vectors_is_that_of_all_classes(self):
        log_probs = torch.randn(4, 3).log_softmax(-1)
        x = to_one_hot(torch.tensor([0, 1, 2, 0]), 3).requires_grad_()
        select_log_prob(log_probs, x).sum().backward()
        torch.testing.assert_close(x.grad, log_probs)
