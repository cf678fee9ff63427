"""What all rules share."""

import pytest
import torch

from dflows.errors import UserError
from dflows.gradients import GumbelStraightThrough, ReinMax, SoftmaxStraightThrough, gumbel_like
from tests.dflows.bijections.cases import RULES, one_hot


@pytest.mark.parametrize("name", RULES)
class TestEach:
    @pytest.mark.parametrize("shape", [(), (3,), (6, 3), (2, 0, 3)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_largest_logit_is_chosen_in_evaluation_mode(self, name, shape, dtype):
        logits = torch.randn(*shape, 5, dtype=dtype, requires_grad=True)
        chosen = RULES[name]().eval()(logits)
        assert chosen.dtype == dtype
        assert torch.equal(chosen, one_hot(logits.argmax(-1), 5, dtype))

    def test_a_choice_is_exactly_one_hot_and_the_same_without_a_gradient(self, name):
        rule, logits = RULES[name](), torch.randn(6, 3, 5, requires_grad=True)
        torch.manual_seed(1)
        chosen = rule(logits)
        assert torch.equal(chosen, one_hot(chosen.argmax(-1), 5))
        torch.manual_seed(1)
        with torch.no_grad():
            assert torch.equal(rule(logits), chosen)

    def test_logits_that_are_minus_infinity_receive_no_gradient(self, name):
        logits = torch.randn(6, 3, 5)
        logits[..., 2] = -torch.inf
        logits.requires_grad_()
        chosen = RULES[name]()(logits)
        assert (chosen[..., 2] == 0).all()
        (grad,) = torch.autograd.grad((chosen * torch.randn(6, 3, 5)).sum(), logits)
        assert (grad[..., 2] == 0).all()
        assert grad.isfinite().all()
        assert (grad[..., 0] != 0).all()

    def test_it_samples_in_training_mode_if_it_is_stochastic(self, name):
        rule, logits = RULES[name](), torch.randn(1, 5).expand(1000, 5)
        assert (len(rule(logits).argmax(-1).unique()) > 1) == rule.stochastic
        assert rule.stochastic == (name in ("gumbel", "reinmax"))
        state = torch.random.get_rng_state()
        assert len(rule.eval()(logits).argmax(-1).unique()) == 1
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_it_has_no_parameters_and_says_its_temperature(self, name):
        rule = RULES[name]()
        assert not rule.state_dict()
        assert name == "posterior" or f"temperature={rule.temperature}" in repr(rule)

    def test_the_temperature_that_the_gradient_stands_for(self, name):
        # A sampled choice stands for the softmax of the logits themselves.
        expected = 0.1 if name == "straight-through" else 1.0
        assert RULES[name]().choice_temperature == expected


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("rule", [SoftmaxStraightThrough, GumbelStraightThrough, ReinMax])
def test_a_temperature_that_is_not_positive_is_refused(rule, temperature):
    with pytest.raises(UserError, match="positive"):
        rule(temperature)


def test_gumbel_noise_has_the_distribution_of_gumbel():
    noise = gumbel_like(torch.zeros(100_000, dtype=torch.float64)).sort().values
    quantiles = (-(-noise).exp()).exp()
    expected = (torch.arange(len(noise)) + 0.5) / len(noise)
    assert (quantiles - expected).abs().max() < 0.006  # Kolmogorov-Smirnov, 1 in 1,000
