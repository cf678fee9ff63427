"""The line with a bump: its inverse, its slope, and the two modes that it is there for."""

import math

import pytest
import torch

from dflows.latent import NonlinearSquared


def drawn(scale, size=1000, dtype=torch.float64):
    return NonlinearSquared(*(scale * torch.randn(5, size, dtype=dtype)))


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1000.0])
def test_the_inverse_is_one(scale):
    transform = drawn(scale)
    x = 5 * torch.randn(1000, dtype=torch.float64)
    y = transform(x)
    assert torch.allclose(transform.inv(y), x, rtol=1e-6, atol=1e-6)
    assert torch.allclose(transform(transform.inv(x)), x, rtol=1e-6, atol=1e-6)


def test_so_it_is_in_single_precision_and_far_away():
    transform = drawn(1.0, dtype=torch.float32)
    for reach in (1.0, 1e3, 1e6, 1e9):
        y = reach * torch.randn(1000)
        x = transform.inv(y)
        assert x.isfinite().all()
        assert torch.allclose(transform(x), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_logarithm_of_the_slope_is_that_of_autograd(scale):
    transform = drawn(scale)
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    y = transform(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (slope > 0).all()
    assert torch.allclose(transform.log_abs_det_jacobian(x, y), slope.log(), atol=1e-8)


@pytest.mark.parametrize(("height", "modes"), [(0.0, 1), (3.0, 2)])
def test_noise_comes_out_with_two_modes(height, modes):
    numbers = torch.tensor([0.0, 0.0, height, 1.0, 0.0], dtype=torch.float64)
    transform = NonlinearSquared(*numbers)
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    density = (-0.5 * transform(x) ** 2 + transform.log_abs_det_jacobian(x, x)).exp()
    assert float(density.sum() * 0.006) == pytest.approx(math.sqrt(2 * math.pi), abs=1e-3)
    inside = density[1:-1]
    assert int(((inside > density[:-2]) & (inside > density[2:])).sum()) == modes
