"""The bounds of a latent-variable model, against the likelihood where it can be integrated."""

import itertools
import math

import pytest
import torch
from torch import nn

from dflows.backbones import LSTM, DilatedConvolution, Masked
from dflows.errors import NonFiniteError, UserError
from dflows.latent import AutoregressivePrior, InverseAutoregressivePrior, LatentFlow

PRIORS = (AutoregressivePrior, InverseAutoregressivePrior)
K, D = 3, 2


def network():
    return LSTM(width=6, bidirectional=True)


def made(kind=AutoregressivePrior, length=D, features=2, num_classes=K):
    prior = kind(features, hidden=6, couplings=2, coupling_width=8)
    model = LatentFlow(num_classes, length, prior, network(), network()).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(6)
        # A posterior wider than the prior, so that no draw has a great weight.
        model.posterior.bias[features:] = 0.5
    return model


def marginal(model, reach=6.0, points=21):
    """The probabilities of all sequences, by the trapezoid rule over the noise."""
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    noise = torch.cartesian_prod(*[axis] * (D * 2)).view(-1, D, 2)
    step = float(axis[1] - axis[0])
    weight = (-0.5 * noise.square().sum((1, 2))).exp() * (step**2 / (2 * math.pi)) ** D
    with torch.no_grad():
        probs = model.logits(model.prior.transform(noise)).softmax(-1)
    return torch.einsum("n,nj,nk->jk", weight, probs[:, 0], probs[:, 1])


@pytest.mark.parametrize("kind", PRIORS)
def test_bounds_lie_below_the_likelihood_and_reach_it(kind):
    model = made(kind)
    exact = marginal(model)
    assert float(exact.sum()) == pytest.approx(1, abs=1e-4)
    assert float(exact.std()) > 0.01
    y = torch.tensor(list(itertools.product(range(K), repeat=D)))
    with torch.no_grad():
        terms = model.terms(y, num_samples=10_000)
    log_prob = exact.flatten().log()
    weight = terms.log_emission - terms.divergence
    evidence = terms.bound()
    assert torch.allclose(evidence, weight.mean(0))
    ten = (weight.view(-1, 10, len(y)).logsumexp(1) - math.log(10)).mean(0)
    assert (evidence < ten - 1e-3).all()
    assert (ten < log_prob).all()
    ratio = (weight - log_prob).exp()
    assert torch.allclose(terms.importance_bound(), log_prob + ratio.mean(0).log())
    error = ratio.std(0) / len(ratio) ** 0.5
    assert (error < 0.05).all()
    assert ((ratio.mean(0) - 1).abs() < 4 * error).all()


def test_the_divergence_is_weighted():
    terms = made().terms(torch.zeros(2, D, dtype=torch.long), num_samples=4)
    assert torch.equal(terms.bound(0.0), terms.log_emission.mean(0))
    half = (terms.bound(0.0) + terms.bound(1.0)) / 2
    assert torch.allclose(terms.bound(0.5), half)


@pytest.mark.parametrize("kind", PRIORS)
def test_samples_are_of_the_model(kind):
    model = made(kind)
    exact = marginal(model)
    y = model.sample(20_000, generator=torch.Generator().manual_seed(1))
    counts = torch.zeros(K, K, dtype=torch.double)
    counts.index_put_((y[:, 0], y[:, 1]), torch.ones(len(y)).double(), accumulate=True)
    assert torch.allclose(counts / len(y), exact, atol=0.015)


@pytest.mark.parametrize("kind", PRIORS)
def test_a_seed_gives_a_sample_of_any_length(kind):
    model = made(kind, length=9, features=4)
    for length in (1, 5, 9):
        first, second, other = (
            model.sample(6, length=length, generator=torch.Generator().manual_seed(seed))
            for seed in (3, 3, 4)
        )
        assert first.shape == (6, length)
        assert torch.equal(first, second)
        assert length == 1 or not torch.equal(first, other)
    assert model.sample(2).shape == (2, 9)
    assert model.passes == model.prior.passes(9) + 1


def test_a_low_temperature_leaves_one_sequence():
    y = made(length=9, features=4).sample(20, temperature=1e-6)
    assert (y == y[0]).all()


def test_a_shorter_window_is_an_event_of_its_own():
    model = made(length=9)
    terms = model.terms(torch.zeros(2, 4, dtype=torch.long), num_samples=3)
    assert terms.log_emission.shape == terms.divergence.shape == (3, 2)


def test_any_network_that_sees_all_will_do():
    plain = Masked(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), width=8)
    prior = AutoregressivePrior(4, 8)
    model = LatentFlow(5, 6, prior, plain, DilatedConvolution(width=8, layers=1))
    assert model.sample(2).shape == (2, 6)
    with pytest.raises(UserError, match="the width of a Linear is not known"):
        LatentFlow(5, 6, prior, network(), nn.Linear(8, 8))


def test_likelihoods_of_a_half_precision_model_are_float32():
    terms = made(features=4).bfloat16().terms(torch.zeros(2, D, dtype=torch.long), num_samples=3)
    assert terms.log_emission.dtype == terms.divergence.dtype == torch.float32


def test_a_network_that_sees_the_past_alone_is_refused():
    with pytest.raises(UserError, match="inference network, a LSTM, is level-causal"):
        LatentFlow(5, 6, AutoregressivePrior(4, 8), LSTM(width=8), network())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.sample(1, temperature=0.0), "temperature is 0.0"),
        (lambda model: model.sample(1, length=0), "an event of 0 dimensions"),
        (lambda model: model.terms(torch.zeros(1, 3).long()), "3 dimensions was given, .* has 2"),
        (lambda model: model.terms(torch.zeros(1, 2).long(), 0), "num_samples is 0"),
    ],
)
def test_what_cannot_be_had_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call(made())


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("part", ["head", "posterior", "embedding"])
def test_what_has_diverged_is_an_error(kind, part):
    model = made(kind)
    next(getattr(model, part).parameters()).data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="LatentFlow"):
        model.terms(torch.randint(K, (4, D)))
    if part == "head":
        with pytest.raises(NonFiniteError, match="LatentFlow"):
            model.sample(2)
