import copy

import pytest
import torch

from dflows import DiscreteFlow, flows
from dflows.backbones import LSTM
from dflows.bases import FactorizedBase
from dflows.errors import UserError
from dflows.orderings import Natural, Strided
from lightning_modules import FlowModule
from lightning_modules.checkpoints import load_weights, match_precision, start_weights
from tests.dflows.small import make_flow, make_transform, shaken


def over_lanes(seed=0):
    torch.manual_seed(seed)
    return FlowModule(
        shaken(flows.language_model(5, 8, lambda: LSTM(8), ordering=Strided(4)), seed)
    )


def of_ranks(columns=4):
    transform = make_transform(5, 8, Strided(columns), "rank", LSTM(8))
    return FlowModule(DiscreteFlow(FactorizedBase(5, 8), [transform]))


def test_a_model_of_the_same_configuration_takes_all_weights():
    one, other = over_lanes(0), over_lanes(1)
    start_weights(other, one.state_dict(), "one.ckpt")
    y = torch.randint(5, (9, 8))
    assert torch.equal(one.flow.log_prob(y), other.flow.log_prob(y))


def test_a_flow_ranks_by_the_network_of_a_language_model():
    one, flow = over_lanes(), of_ranks(columns=2)
    base = copy.deepcopy(flow.flow.base.state_dict())
    start_weights(flow, one.state_dict(), "one.ckpt")
    y = torch.randint(5, (9, 8))
    with torch.no_grad():
        (transform,) = flow.flow.transforms
        logits = one.flow.with_passes(2).base.conditioner(y)
        dimensions = transform.transformed(y)
        assert torch.equal(transform.logits(y, dimensions), logits[:, dimensions])
        ranks = (logits > logits.gather(-1, y.unsqueeze(-1))).sum(-1)
        assert torch.equal(transform.inverse(y)[:, dimensions], ranks[:, dimensions])
    assert all(torch.equal(value, base[key]) for key, value in flow.flow.base.state_dict().items())


def test_weights_of_double_precision_are_held_as_they_are():
    one, other = over_lanes(0).double(), over_lanes(1)
    match_precision(other, one.state_dict())
    load_weights(other, one.state_dict(), "one.ckpt")
    y = torch.randint(5, (9, 8))
    assert one.flow.log_prob(y).dtype == torch.float64
    assert torch.equal(one.flow.log_prob(y), other.flow.log_prob(y))
    match_precision(single := over_lanes(1), over_lanes(0).state_dict())
    assert {part.dtype for part in single.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            lambda: FlowModule(make_flow(5, 8, [Natural(), Natural()])),
            "has 2 conditioners, and the",
        ),
        (lambda: FlowModule(DiscreteFlow(FactorizedBase(5, 8))), "has 0 conditioners"),
        (lambda: FlowModule(make_flow(5, 8, [Natural()])), "weights in one.ckpt do not fit"),
    ],
)
def test_networks_that_are_others_are_refused(module, message):
    with pytest.raises(UserError, match=message):
        start_weights(module(), over_lanes().state_dict(), "one.ckpt")
