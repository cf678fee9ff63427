import pytest
import torch

from dflows.bijections import ModularShift
from dflows.gradients import GumbelStraightThrough, ReinMax
from tests.dflows.bijections.cases import one_hot


def _through(p, grad):
    """The gradient of the logits of a softmax p, where that of its value is given."""
    return p * (grad - (p * grad).sum(-1, keepdim=True))


@pytest.mark.parametrize("rule", [GumbelStraightThrough, ReinMax])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_it_samples_from_the_softmax_of_the_logits(rule, temperature):
    # Whatever the temperature, which is the gradient's.
    row = torch.randn(4, dtype=torch.float64)
    torch.manual_seed(1)
    sampled = rule(temperature)(row.expand(40_000, 4))
    counts, expected = sampled.sum(0), 40_000 * row.softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 21.1  # 3 degrees of freedom: 1 in 10,000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_softmax_has_the_gradient_of_the_perturbed_softmax(temperature):
    logits = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 5, dtype=torch.float64)
    torch.manual_seed(1)
    hard = GumbelStraightThrough(temperature)(logits)
    (grad,) = torch.autograd.grad((hard * weight).sum(), logits)
    torch.manual_seed(1)
    perturbed = logits - torch.empty_like(logits).exponential_().log()
    assert torch.equal(hard.argmax(-1), perturbed.argmax(-1))
    p = (perturbed / temperature).softmax(-1)
    torch.testing.assert_close(grad, _through(p, weight) / temperature)


def test_gumbel_softmax_is_unbiased_for_linear_functions_as_the_temperature_falls():
    logits = torch.randn(5, dtype=torch.float64)
    weight = torch.randn(5, dtype=torch.float64)
    exact = _through(logits.softmax(-1), weight)
    torch.manual_seed(1)
    distances = []
    for temperature in (3.0, 0.1):
        many = logits.expand(200_000, 1, 5).requires_grad_()
        hard = GumbelStraightThrough(temperature)(many)
        (grad,) = torch.autograd.grad((hard * weight).sum(), many)
        distances.append(float((grad.mean((0, 1)) - exact).norm() / exact.norm()))
    assert distances[1] < 0.03 < distances[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_reinmax_has_its_formula(temperature):
    logits = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 5, dtype=torch.float64)
    hard = ReinMax(temperature)(logits)
    (grad,) = torch.autograd.grad((hard * weight).sum(), logits)
    # Algorithm 2 of the paper, as it stands there, by automatic differentiation.
    p0 = logits.softmax(-1)
    p1 = (hard.detach() + (logits / temperature).softmax(-1)) / 2
    p1 = ((p1.log() - logits).detach() + logits).softmax(-1)
    (expected,) = torch.autograd.grad(((2 * p1 - p0 / 2) * weight).sum(), logits)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_reinmax_is_unbiased_up_to_quadratic_functions(monkeypatch, degree):
    # The expectation over the choice, by enumeration.
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    form = torch.randn(*[4] * degree, dtype=torch.float64)

    def f(one_hot):
        value = form
        for _ in range(degree):
            value = value @ one_hot
        return value

    p = logits.softmax(-1)
    choices = torch.eye(4, dtype=torch.float64)
    exact = torch.autograd.grad(sum(p[k] * f(choices[k]) for k in range(4)), logits)[0]
    mean = torch.zeros(4, dtype=torch.float64)
    for k in range(4):
        noise = torch.where(choices[k] > 0, 1e-9, 1e9)
        monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, n=noise: self.copy_(n))
        hard = ReinMax()(logits.expand(1, 4))
        assert torch.equal(hard[0], choices[k])
        mean += p[k].detach() * torch.autograd.grad(f(hard[0]), logits)[0]
    assert torch.allclose(mean, exact, rtol=1e-9, atol=1e-9) == (degree < 3)


@pytest.mark.parametrize("rule", [GumbelStraightThrough, ReinMax])
def test_a_mean_over_samples_is_the_expected_log_likelihood(rule):
    shift = ModularShift(3, rule())
    base = torch.randn(2, 3).log_softmax(-1)
    logits, y = torch.randn(5, 2, 3), torch.randint(3, (5, 2))
    x = (y.unsqueeze(-1) - torch.arange(3)) % 3
    expected = (logits.softmax(-1) * base.expand(5, 2, 3).gather(-1, x)).sum()
    torch.manual_seed(1)
    many = shift.inverse(one_hot(y, 3).expand(20_000, 5, 2, 3), logits.expand(20_000, 5, 2, 3))
    values = (many * base).sum((-1, -2, -3)).double()
    assert (values.mean() - expected).abs() < 4 * values.std() / len(values) ** 0.5
