import pytest
import torch

from dflows.bijections import ModularShift
from dflows.gradients import SoftmaxStraightThrough
from tests.dflows.bijections.cases import one_hot


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_the_gradient_is_that_of_a_softmax(temperature):
    logits = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 5, dtype=torch.float64)
    hard = SoftmaxStraightThrough(temperature)(logits)
    p = (logits / temperature).softmax(-1)
    expected = p * (weight - (p * weight).sum(-1, keepdim=True)) / temperature
    (grad,) = torch.autograd.grad((hard * weight).sum(), logits)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_expected_log_likelihood_is_what_it_ascends(temperature):
    # Of one transform next to the base: the gradient of the mean of log p over the choices.
    shift = ModularShift(4, SoftmaxStraightThrough(temperature))
    base = torch.randn(3, 4, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(7, 3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randint(4, (7, 3))
    log_prob = (shift.inverse(one_hot(y, 4, torch.float64), logits) * base).sum()
    (actual,) = torch.autograd.grad(log_prob, logits)
    x = (y.unsqueeze(-1) - torch.arange(4)) % 4
    likelihoods = base.expand(7, 3, 4).gather(-1, x)
    expected = ((logits / shift.rule.choice_temperature).softmax(-1) * likelihoods).sum()
    torch.testing.assert_close(actual, torch.autograd.grad(expected, logits)[0])
