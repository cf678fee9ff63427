"""The priors: two directions of one map, densities, and what is known where."""

import sys

import pytest
import torch

from dflows.errors import UserError
from dflows.latent import AutoregressivePrior, InverseAutoregressivePrior
from dflows.latent.prior import normal_log_prob

PRIORS = (AutoregressivePrior, InverseAutoregressivePrior)
B, T, F = 3, 4, 5


def made(kind, features=F, *, spread=1.0, **options):
    """A prior in double precision, far enough from where it starts."""
    prior = kind(features, hidden=6, coupling_width=8, **options).double().eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(spread * 0.3 * torch.randn_like(parameter))
    return prior


def vectors(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("univariate", ["squared", "affine", "spline"])
@pytest.mark.parametrize(("features", "layers", "couplings"), [(2, 1, 1), (5, 2, 3)])
def test_the_two_directions_undo_each_other(kind, univariate, features, layers, couplings):
    prior = made(kind, features, layers=layers, couplings=couplings, univariate=univariate)
    noise = vectors(B, T, features)
    z = prior.transform(noise)
    assert not torch.allclose(z, noise, atol=1e-2)
    again, log_det = prior.inv(z)
    assert torch.allclose(again, noise, atol=1e-8)
    assert log_det.shape == (B, T)
    assert torch.allclose(prior.transform(prior.inv(noise)[0]), noise, atol=1e-8)


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("univariate", ["squared", "affine", "spline"])
def test_the_log_determinant_is_that_of_the_jacobian(kind, univariate):
    prior = made(kind, univariate=univariate)
    z = vectors(1, T, F)
    jacobian = torch.autograd.functional.jacobian(lambda z: prior.inv(z)[0], z)
    sign, expected = jacobian.reshape(T * F, T * F).slogdet()
    assert sign == 1
    assert torch.allclose(prior.inv(z)[1].sum(), expected, atol=1e-8)
    # By the other direction the same density.
    noise, _ = prior.inv(z)
    back = torch.autograd.functional.jacobian(prior.transform, noise).reshape(T * F, T * F)
    change = normal_log_prob(noise).sum() - back.slogdet()[1]
    assert torch.allclose(prior.log_prob(z), change, atol=1e-8)


@pytest.mark.parametrize("kind", PRIORS)
def test_a_position_knows_of_none_behind_it(kind):
    prior = made(kind)
    z = vectors(1, T, F)
    for apply in (lambda z: prior.inv(z)[0], prior.transform):
        jacobian = torch.autograd.functional.jacobian(apply, z)[0, :, :, 0].abs().sum((1, 3))
        assert torch.equal(jacobian > 0, torch.ones(T, T, dtype=torch.bool).tril())


@pytest.mark.parametrize("kind", PRIORS)
def test_the_density_integrates_to_one(kind):
    prior = made(kind, 2)
    axis = torch.linspace(-12, 12, 301, dtype=torch.float64)
    second = torch.cartesian_prod(axis, axis).view(-1, 1, 2)
    cell = float(axis[1] - axis[0]) ** 2
    with torch.no_grad():
        assert cell * float(prior.log_prob(second).exp().sum()) == pytest.approx(1, abs=1e-3)
        # And over the second position, given a first.
        first = vectors(1, 1, 2)
        pairs = torch.cat([first.expand_as(second), second], dim=1)
        joint = cell * float(prior.log_prob(pairs).exp().sum())
        assert joint == pytest.approx(float(prior.log_prob(first).exp()), rel=1e-3)


def twins(**options):
    first, second = (made(kind, **options) for kind in PRIORS)
    second.load_state_dict(first.state_dict())
    return first, second


def test_they_are_one_density_where_there_is_no_past():
    one, other = twins()
    z = vectors(B, 1, F)
    assert torch.allclose(one.log_prob(z), other.log_prob(z), atol=1e-10)
    z = vectors(B, T, F)
    assert not torch.allclose(one.log_prob(z), other.log_prob(z), atol=1e-3)
    with torch.no_grad():
        for prior in (one, other):
            prior.lstm.weight_ih_l0.zero_()
    assert torch.allclose(one.log_prob(z), other.log_prob(z), atol=1e-10)


def test_what_one_does_in_parallel_the_other_does_in_steps():
    # Read from the other end, a map of steps is a map that reads what it has made.
    one, other = twins()
    z = vectors(B, T, F)
    noise, log_det = one.inv(z)
    states = one._states(z)
    found, change = one._to_noise(z, states)
    assert torch.equal(found, noise)
    assert torch.equal(change, log_det)
    step = one._steps(B)
    before = torch.cat([one.start.expand(B, 1, -1), z[:, :-1]], dim=1)
    stepped = torch.stack([step(row) for row in before.unbind(1)], dim=1)
    assert torch.allclose(stepped, states, atol=1e-10)
    assert torch.allclose(other._states(z), states, atol=1e-10)


@pytest.mark.parametrize("kind", PRIORS)
def test_every_parameter_gets_a_gradient(kind):
    prior = kind(F, hidden=6, layers=2, couplings=2, dropout=0.2)
    (-prior.log_prob(torch.randn(B, T, F)).mean()).backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())


def test_passes():
    assert made(AutoregressivePrior).passes(9) == 9
    assert made(InverseAutoregressivePrior).passes(9) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 1}, "features is 1: a coupling splits them, give at least 2"),
        ({"hidden": 0}, "hidden is 0"),
        ({"couplings": 0}, "couplings is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"univariate": "cubic"}, "univariate is 'cubic': give squared, affine, spline"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(UserError, match=message):
        AutoregressivePrior(**{"features": 4, "hidden": 8, **options})


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko.flows.coupling", None)
    with pytest.raises(UserError, match=r"needs zuko, .*: pip install 'dflows\[latent\]'"):
        AutoregressivePrior(4, 8)
