"""One objective after another."""

import pytest
import torch

from dflows.errors import UserError
from dflows.objectives import EndToEnd, Layerwise, Local, OneAfterAnother
from dflows.orderings import Natural, Parity, Strided
from tests.dflows.small import (
    assert_gradients_close,
    gradients,
    make_flow,
    prepared,
    states,
)

STACK = [Strided(columns=3), Natural(), Parity(first=1)]


@pytest.mark.parametrize("rule", ["straight-through", "posterior"])
def test_it_is_one_and_then_the_other(rule):
    y = torch.randint(4, (6, 5))
    flow = make_flow(4, 5, STACK, "affine", "causal", rule)
    objective = prepared(OneAfterAnother(Local(), EndToEnd(), at=0.25), flow)
    for progress, other in (
        (0.0, objective.first),
        (0.24, objective.first),
        (0.25, objective.then),
        (1.0, objective.then),
    ):
        value = objective(flow, y, progress=progress)
        torch.testing.assert_close(value, flow.log_prob(y))
        value.sum().backward()
        actual, own = gradients(flow), gradients(objective)
        other(flow, y).sum().backward()
        expected = gradients(flow)
        assert_gradients_close(actual, expected)
        assert own.keys() == {name for name, _ in objective.named_parameters()}
        # A target that is not used is trained to stay: distributed training awaits it.
        learnt = any(grad.any() for grad in own.values())
        assert learnt == (other is objective.first)
        gradients(objective)


@pytest.mark.parametrize("rule", ["gumbel", "reinmax"])
def test_the_likelihood_is_exact_while_maps_are_drawn(rule):
    flow = make_flow(3, 4, [Natural(), Parity()], rule=rule).train()
    objective, y = prepared(OneAfterAnother(Local(), EndToEnd()), flow), states(3, 4)
    with torch.no_grad():
        exact = flow.log_prob(y)
    torch.testing.assert_close(exact.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(objective(flow, y, progress=0.4), exact)
    assert (objective(flow, y, progress=0.6) - exact).abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(y), exact)


@pytest.mark.parametrize("subsample", ["levels", "transforms"])
def test_the_first_may_subsample(subsample):
    flow = make_flow(3, 4, [Natural(), Parity()])
    objective = prepared(OneAfterAnother(Local(subsample), EndToEnd()), flow)
    y = torch.randint(3, (9, 4))
    exact = flow.log_prob(y)
    assert not torch.allclose(objective(flow, y, progress=0.0), exact)
    torch.testing.assert_close(objective(flow, y, progress=0.5), exact)


class TestProgress:
    class Noting(EndToEnd):
        def __init__(self, seen):
            super().__init__()
            self.seen = seen

        def evaluate(self, flow, y, context, progress):
            self.seen.append(progress)
            return super().evaluate(flow, y, context, progress)

        def frozen(self, flow, progress):
            self.seen.append(progress)
            return []

    @pytest.mark.parametrize(
        ("progress", "first", "then"),
        [
            (0.0, [0.0, 0.0], []),
            (0.2, [0.5, 0.5], []),
            (0.4, [], [0.0, 0.0]),
            (0.7, [], [0.5, 0.5]),
            (1.0, [], [1.0, 1.0]),
        ],
    )
    def test_each_is_told_that_of_its_own_part(self, progress, first, then):
        seen = [], []
        objective = OneAfterAnother(*map(self.Noting, seen), at=0.4)
        flow = make_flow()
        objective(flow, torch.randint(3, (2, 4)), progress=progress)
        objective.frozen(flow, progress)
        assert seen[0] == pytest.approx(first)
        assert seen[1] == pytest.approx(then)

    def test_stages_of_one_lie_within_its_part(self):
        flow = make_flow(4, 5, STACK)
        objective = prepared(OneAfterAnother(Layerwise(), EndToEnd(), at=0.6), flow)
        layerwise = objective.first
        y = torch.randint(4, (6, 5))
        for progress, inner in ((0.0, 0.0), (0.19, 0.19 / 0.6), (0.21, 0.35), (0.5, 5 / 6)):
            frozen = {id(parameter) for parameter in objective.frozen(flow, progress)}
            assert frozen == {id(parameter) for parameter in layerwise.frozen(flow, inner)}
            objective(flow, y, progress=progress).sum().backward()
            actual = gradients(flow)
            layerwise(flow, y, progress=inner).sum().backward()
            assert actual.keys() == gradients(flow).keys()
        frozen = {id(parameter) for parameter in objective.frozen(flow, 0.6)}
        assert frozen == {id(parameter) for parameter in layerwise.parameters()}

    def test_they_may_be_nested(self):
        flow, y = make_flow(), torch.randint(3, (5, 4))
        inner = OneAfterAnother(Local(), EndToEnd())
        objective = prepared(OneAfterAnother(inner, EndToEnd()), flow)
        assert objective.end_to_end(0.2) is False
        assert objective.end_to_end(0.3) is True
        torch.testing.assert_close(objective(flow, y, progress=0.2), flow.log_prob(y))


@pytest.mark.parametrize("at", [0, 1, -0.5, 2.0, float("nan")])
def test_they_change_within_the_training(at):
    with pytest.raises(UserError, match="between 0 and 1"):
        OneAfterAnother(Local(), EndToEnd(), at=at)


def test_both_are_prepared():
    flow = make_flow()
    objective = OneAfterAnother(Local(), Layerwise())
    objective.prepare(flow)
    assert len(list(objective.parameters())) == 4
    assert "at=0.5" in repr(objective)
