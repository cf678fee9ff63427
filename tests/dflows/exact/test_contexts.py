"""Evaluating each context once gives what evaluating every state does."""

import pytest
import torch

from dflows import AutoregressiveBase, DiscreteFlow
from dflows.conditioner import Conditioner
from dflows.exact.contexts import each_context_once
from dflows.orderings import Halves, Natural, Reversed
from tests.dflows.small import BACKBONES, ORDERINGS, make_flow, make_transform, shaken, states

LENGTH = 5


def rows_evaluated(flow, y):
    """How many rows the heads of a flow's networks see while it scores some values."""
    seen = []
    hooks = [
        part.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
        for part in flow.modules()
        if isinstance(part, Conditioner)
    ]
    log_prob = flow.log_prob(y)
    for hook in hooks:
        hook.remove()
    return sum(seen), log_prob


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("ordering", ORDERINGS)
def test_log_probs_are_the_same(ordering, backbone):
    flow = make_flow(3, LENGTH, [ORDERINGS[ordering], Reversed()], backbone=backbone)
    flow = shaken(flow).double().eval()
    y = states(3, LENGTH)
    with torch.no_grad():
        expected = flow.log_prob(y)
    with each_context_once(flow):
        found = flow.log_prob(y)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_an_autoregressive_base_too():
    base = AutoregressiveBase(3, LENGTH, backbone=BACKBONES["causal"](), ordering=Reversed())
    flow = shaken(DiscreteFlow(base, [make_transform(3, LENGTH, Natural())])).double().eval()
    y = states(3, LENGTH)
    with torch.no_grad():
        expected = flow.log_prob(y)
    with each_context_once(flow):
        assert torch.allclose(flow.log_prob(y), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("ordering", "rows"), [(Halves(), 3**2), (Halves(first=1), 3**3)])
def test_a_context_is_evaluated_once(ordering, rows):
    flow = shaken(make_flow(3, LENGTH, [ordering], backbone="causal")).eval()
    with each_context_once(flow):
        assert rows_evaluated(flow, states(3, LENGTH))[0] == rows


def test_few_states_are_evaluated_as_they_are():
    flow = shaken(make_flow(3, LENGTH, [Natural()], backbone="causal")).eval()
    with each_context_once(flow):
        rows, _ = rows_evaluated(flow, states(3, LENGTH)[::50])
    assert rows == len(states(3, LENGTH)[::50])


def test_flows_are_left_as_they_were():
    flow = make_flow(3, LENGTH, [Natural()])
    with pytest.raises(ZeroDivisionError), each_context_once(flow):
        raise ZeroDivisionError
    assert all("forward" not in vars(part) for part in flow.modules())
    assert flow.log_prob(states(3, LENGTH)).requires_grad
