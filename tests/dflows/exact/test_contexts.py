"""Evaluating each context once gives what evaluating every state does."""

import pytest
import torch

from dflows import AutoregressiveBase, Context, DiscreteFlow
from dflows.conditioner import Conditioner
from dflows.exact.contexts import each_context_once
from dflows.orderings import Halves, Natural, Reversed
from dflows.representations import to_one_hot
from tests.dflows.small import BACKBONES, ORDERINGS, make_flow, make_transform, shaken, states

LENGTH = 5


def rows_evaluated(flow, y, monkeypatch):
    """How many rows the networks of a flow see while it scores some values, and the scores."""
    seen = []
    features = Conditioner.features

    def counted(self, y, *arguments):
        seen.append(len(y))
        return features(self, y, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Conditioner, "features", counted)
        log_prob = flow.log_prob(y)
    return sum(seen), log_prob


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("ordering", ORDERINGS)
def test_log_probs_are_the_same(ordering, backbone):
    flow = make_flow(3, LENGTH, [ORDERINGS[ordering], Reversed()], backbone=backbone)
    flow = shaken(flow).double().eval()
    y = states(3, LENGTH)
    with torch.no_grad():
        expected = flow.log_prob(y)
    with each_context_once():
        found = flow.log_prob(y)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_an_autoregressive_base_too():
    base = AutoregressiveBase(Conditioner(3, LENGTH, Reversed(), BACKBONES["causal"]()))
    flow = shaken(DiscreteFlow(base, [make_transform(3, LENGTH, Natural())])).double().eval()
    y = states(3, LENGTH)
    with torch.no_grad():
        expected = flow.log_prob(y)
    with each_context_once():
        assert torch.allclose(flow.log_prob(y), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("ordering", "rows"), [(Halves(), 3**2), (Halves(first=1), 3**3)])
def test_a_context_is_evaluated_once(ordering, rows, monkeypatch):
    flow = shaken(make_flow(3, LENGTH, [ordering], backbone="causal")).eval()
    with each_context_once():
        assert rows_evaluated(flow, states(3, LENGTH), monkeypatch)[0] == rows


def test_few_states_are_evaluated_as_they_are(monkeypatch):
    flow = shaken(make_flow(3, LENGTH, [Natural()], backbone="causal")).eval()
    y = states(3, LENGTH)[::50]
    with each_context_once():
        rows, _ = rows_evaluated(flow, y, monkeypatch)
    assert rows == len(y)


def test_what_differs_from_row_to_row_is_evaluated_as_it_is():
    y = states(3, LENGTH)
    conditioner = make_flow(3, LENGTH, [Natural()]).transforms[0].conditioner.eval()
    with each_context_once():
        assert torch.allclose(conditioner(to_one_hot(y, 3)), conditioner(y), atol=1e-5)
    told = Conditioner(3, LENGTH, Natural(), BACKBONES["masked"](), context=Context(2))
    told, context = shaken(told).eval(), torch.randn(len(y), 2)
    with torch.no_grad():
        expected = told(y, context)
    with each_context_once():
        assert torch.equal(told(y, context), expected)


@pytest.mark.parametrize("first_level", [0, 1, 3])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_levels_below_the_first_are_zeros(backbone, first_level):
    conditioner = Conditioner(3, LENGTH, Halves(), BACKBONES[backbone]())
    y, conditioner = states(3, LENGTH), shaken(conditioner).eval()
    with torch.no_grad():
        expected = conditioner(y, first_level=first_level)
    with each_context_once():
        found = conditioner(y, first_level=first_level)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found[:, Halves().levels(LENGTH) < first_level] == 0).all()


def test_flows_are_evaluated_as_before_afterwards(monkeypatch):
    flow, y = make_flow(3, LENGTH, [Natural()], backbone="causal"), states(3, LENGTH)
    with pytest.raises(ZeroDivisionError), each_context_once():
        raise ZeroDivisionError
    rows, log_prob = rows_evaluated(flow, y, monkeypatch)
    assert rows == len(y)
    assert log_prob.requires_grad
