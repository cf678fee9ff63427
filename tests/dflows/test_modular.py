from functools import cache
from math import gcd

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dflows import modular

# (K, M): prime and composite classes, and moduli above them whose cycles are walked.
SIZES = [(2, 2), (3, 3), (4, 4), (6, 6), (7, 7), (9, 9), (4, 5), (6, 7), (3, 7), (8, 11), (6, 10)]


@cache
def dense(num_classes, modulus):
    """The map as a tensor (loc, scale, x, y) of zeros and ones, by plain arithmetic."""
    tensor = torch.zeros(modulus, modulus, num_classes, num_classes, dtype=torch.float64)
    for loc in range(modulus):
        for scale in range(modulus):
            if gcd(scale, modulus) == 1:
                for x in range(num_classes):
                    y = (loc + scale * x) % modulus
                    while y >= num_classes:
                        y = (loc + scale * y) % modulus
                    tensor[loc, scale, x, y] = 1
    return tensor


def every_map(num_classes, modulus):
    """All (value, loc, scale) with a unit scale, three vectors of indices."""
    scales = [scale for scale in range(modulus) if gcd(scale, modulus) == 1]
    return torch.cartesian_prod(
        torch.arange(num_classes), torch.arange(modulus), torch.tensor(scales)
    ).unbind(-1)


def one_hots(value, loc, scale, num_classes, modulus, dtype=torch.float64):
    sizes = (num_classes, modulus, modulus)
    return [
        F.one_hot(indices, size).to(dtype).requires_grad_()
        for indices, size in zip((value, loc, scale), sizes, strict=True)
    ]


class TestUnits:
    @pytest.mark.parametrize("modulus", [*range(2, 40), 97, 256, 1000])
    def test_inverses_are_those_of_the_units(self, modulus):
        inverses = modular.inverse_table(modulus)
        coprime = torch.tensor([gcd(value, modulus) == 1 for value in range(modulus)])
        assert torch.equal(modular.unit_mask(modulus), coprime)
        assert torch.equal(modular.units(modulus), coprime.nonzero().squeeze(-1))
        products = torch.arange(modulus) * inverses % modulus
        assert (products[coprime] == 1).all()
        assert (inverses[~coprime] == 0).all()

    @pytest.mark.parametrize("modulus", [-1, 0, 1])
    def test_a_modulus_below_2_is_refused(self, modulus):
        for function in (modular.inverse_table, modular.unit_mask, modular.units):
            with pytest.raises(ValueError, match="at least 2"):
                function(modulus)

    def test_a_table_is_the_callers_own(self):
        modular.inverse_table(5).zero_()
        assert modular.inverse_table(5).tolist() == [0, 1, 3, 2, 4]

    def test_next_prime(self):
        primes = [p for p in range(2, 200) if all(p % q for q in range(2, p))]
        for value in range(180):
            assert modular.next_prime(value) == next(p for p in primes if p >= value)


class TestMap:
    @pytest.mark.parametrize(("num_classes", "modulus"), SIZES)
    def test_indices_follow_the_dense_map(self, num_classes, modulus):
        x, loc, scale = every_map(num_classes, modulus)
        y = modular.affine(x, loc, scale, num_classes, modulus=modulus)
        assert torch.equal(y, dense(num_classes, modulus)[loc, scale, x].argmax(dim=-1))
        back = modular.affine_inverse(y, loc, scale, num_classes, modulus=modulus)
        assert torch.equal(back, x)

    @pytest.mark.parametrize(("num_classes", "modulus"), SIZES)
    @pytest.mark.parametrize("inverse", [False, True])
    def test_one_hot_gradient_is_that_of_the_dense_product(self, num_classes, modulus, inverse):
        indices = every_map(num_classes, modulus)
        function = modular.affine_inverse if inverse else modular.affine
        product = "bx,bm,bs,msyx->by" if inverse else "bx,bm,bs,msxy->by"
        inputs = one_hots(*indices, num_classes, modulus)
        expected = torch.einsum(product, *inputs, dense(num_classes, modulus))
        result = function(*inputs, num_classes, modulus=modulus)
        assert torch.equal(result, expected)
        assert torch.equal(result.argmax(-1), function(*indices, num_classes, modulus=modulus))
        weight = torch.randn_like(expected)
        for one, other in zip(
            torch.autograd.grad(result, inputs, weight),
            torch.autograd.grad(expected, inputs, weight),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)

    @given(data=st.data(), num_classes=st.integers(2, 40), extra=st.integers(0, 12))
    def test_there_and_back(self, data, num_classes, extra):
        modulus = num_classes + extra
        loc = torch.tensor(data.draw(st.integers(0, modulus - 1)))
        scale = torch.tensor(data.draw(st.sampled_from(modular.units(modulus).tolist())))
        x = torch.arange(num_classes)
        y = modular.affine(x, loc, scale, num_classes, modulus=modulus)
        assert y.sort().values.tolist() == x.tolist()
        back = modular.affine_inverse(y, loc, scale, num_classes, modulus=modulus)
        assert torch.equal(back, x)
        if modulus == num_classes:
            assert torch.equal(y, (loc + scale * x) % num_classes)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_gradients_keep_the_type_of_their_inputs(self, dtype):
        x, _, _ = one_hots(*every_map(5, 5), 5, 5, dtype)
        _, loc, scale = one_hots(*every_map(5, 5), 5, 5, torch.float32)
        y = modular.affine(x, loc, scale, 5)
        assert y.dtype == dtype
        y.sum().backward()
        assert (x.grad.dtype, loc.grad.dtype) == (dtype, torch.float32)

    def test_location_and_scale_may_be_indices_beside_one_hot_values(self):
        indices = every_map(6, 7)
        x, _, _ = one_hots(*indices, 6, 7)
        y = modular.affine(x, *indices[1:], 6, modulus=7)
        assert torch.equal(y.argmax(-1), modular.affine(*indices, 6, modulus=7))
        assert torch.autograd.grad(y.sum(), x)[0].eq(1).all()

    def test_the_gradient_passes_under_autocast(self):
        inputs = one_hots(*every_map(5, 5), 5, 5, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = modular.affine(*inputs, 5)
        weight = torch.randn_like(y)
        expected = torch.einsum("bx,bm,bs,msxy->by", *inputs, dense(5, 5).float())
        for one, other in zip(
            torch.autograd.grad(y, inputs, weight),
            torch.autograd.grad(expected, inputs, weight),
            strict=True,
        ):
            torch.testing.assert_close(one, other)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own parts
    @pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
    @pytest.mark.parametrize("inverse", [False, True])
    def test_it_compiles(self, inverse):
        function = modular.affine_inverse if inverse else modular.affine
        inputs = one_hots(*every_map(6, 7), 6, 7)
        compiled = torch.compile(function)
        results = [run(*inputs, 6, modulus=7) for run in (function, compiled)]
        assert torch.equal(*results)
        weight = torch.randn_like(results[0])
        for pair in zip(
            *(torch.autograd.grad(result, inputs, weight) for result in results), strict=True
        ):
            assert torch.equal(*pair)


class TestErrors:
    @pytest.mark.parametrize(
        ("scale", "modulus", "message"),
        [
            (2, 4, "2 is no unit modulo 4.*units"),
            (0, 5, "0 is no unit"),
            (5, 5, "outside 0..4"),
            (-1, 5, "outside 0..4"),
        ],
    )
    def test_scales_that_are_no_units_are_refused(self, scale, modulus, message):
        one = torch.tensor(1)
        for function in (modular.affine, modular.affine_inverse):
            with pytest.raises(ValueError, match=message):
                function(one, one, torch.tensor(scale), modulus)

    def test_a_modulus_below_the_classes_is_refused(self):
        one = torch.tensor(1)
        with pytest.raises(ValueError, match="below the number of classes"):
            modular.affine(one, one, one, 5, modulus=3)
        with pytest.raises(ValueError, match="at least 2"):
            modular.affine(one, one, one, 1)
