"""What all bases have in common."""

import pytest
import torch

from dflows.backbones import LSTM
from dflows.bases import AutoregressiveBase, FactorizedBase, NGramBase
from dflows.orderings import Halves, Natural, Reversed, Strided
from tests.dflows.small import make_conditioner, shaken, states


def counted():
    base = NGramBase(3, 4, order=3)
    base.count([torch.randint(3, (200,)).numpy()])
    return base


BASES = {
    "factorized": lambda: FactorizedBase(3, 4, "positions"),
    "n-grams": counted,
    "lstm": lambda: AutoregressiveBase(make_conditioner(3, 4, Reversed(), LSTM(8))),
    "lanes": lambda: AutoregressiveBase(make_conditioner(3, 4, Strided(2), LSTM(8))),
    "transformer": lambda: AutoregressiveBase(make_conditioner(3, 4, Natural(), "causal")),
    "masked": lambda: AutoregressiveBase(make_conditioner(3, 4, Halves(first=1), "masked")),
}


@pytest.fixture(params=BASES.values(), ids=BASES)
def base(request):
    return shaken(request.param()).eval()


@torch.no_grad()
def test_conditionals_are_distributions_whose_product_is_that_of_events(base):
    x = states(3, 4)
    found = base.conditionals(x)
    assert found.shape == (81, 4, 3)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(81, 4).to(found))
    own = found.gather(-1, x.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(own, base.log_prob(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_dimension_is_decided_once_given_the_logits_of_its_conditional(base):
    x = states(3, 4)
    asked = []

    def decide(dimensions, logits):
        asked.extend(dimensions.tolist())
        own = base.conditionals(x)[:, dimensions]
        torch.testing.assert_close(logits.log_softmax(-1), own, atol=1e-5, rtol=1e-5)
        return x[:, dimensions]

    assert torch.equal(base.decode(decide, 81, 4), x)
    assert sorted(asked) == [0, 1, 2, 3]


@torch.no_grad()
def test_a_prefix_is_not_decided(base):
    if not base.supports_prefix(2, 4):
        pytest.skip("its first dimensions depend on later ones")
    prefix, asked = torch.tensor([[2, 1]]).expand(5, -1), []

    def decide(dimensions, logits):
        asked.extend(dimensions.tolist())
        return logits.argmax(-1)

    found = base.decode(decide, 5, 4, prefix=prefix)
    assert torch.equal(found[:, :2], prefix)
    assert sorted(asked) == [2, 3]


@torch.no_grad()
def test_greedy_takes_the_likeliest_of_every_conditional(base):
    x = base.greedy(1, 4)
    assert torch.equal(base.conditionals(x).argmax(-1), x)
