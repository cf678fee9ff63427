"""Layerwise training that goes on with local expectation gradients."""

import math

import pytest
import torch

from dflows import DiscreteFlow, FactorizedBase
from dflows.backbones import Table
from dflows.errors import UserError
from dflows.exact import cross_entropy, expected_log_likelihood
from dflows.objectives import Layerwise, LocalExpectationGradient
from dflows.orderings import Halves, Parity
from tests.dflows.small import (
    BIJECTIONS,
    assert_gradients_close,
    expectation,
    gradients,
    make_flow,
    make_transform,
    prepared,
    random_probabilities,
    shaken,
    states,
)

BOTH_HALVES = [Halves(), Halves(first=1)]


def stack(num_classes, orderings, bijection, length=2, scale=0.5):
    torch.manual_seed(0)
    transforms = [
        make_transform(num_classes, length, ordering, bijection, Table(4, num_classes, length))
        for ordering in orderings
    ]
    flow = DiscreteFlow(FactorizedBase(num_classes, length), transforms)
    return shaken(flow, scale=scale).double()


class TestGradient:
    @pytest.mark.parametrize("bijection", ["shift", "affine"])
    @pytest.mark.parametrize("temperature", [0.7, 2.0])
    def test_its_mean_is_that_of_the_expectation(self, bijection, temperature):
        flow = stack(3, [Halves()], bijection, scale=0.25)  # where no map is too rare to be met
        objective = LocalExpectationGradient(temperature=temperature, num_samples=64)
        (transform,) = flow.transforms
        weights = random_probabilities(3, 2).flatten()
        parameters = list(transform.conditioner.parameters())
        exact = weights @ expected_log_likelihood(flow, temperature)
        exact = torch.autograd.grad(exact, parameters)
        y = states(3, 2)
        total = torch.zeros(len(y), dtype=torch.double)
        for _ in range(300):
            total = total + objective.learn(flow, 0, 0, y, None, rounds=1).zeros / 300
        found = torch.autograd.grad(weights @ total, parameters)
        exact, found = (torch.cat([part.flatten() for part in parts]) for parts in (exact, found))
        assert torch.cosine_similarity(exact, found, dim=0) > 0.995
        assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.05)

    def test_that_of_the_upper_transform_is_of_all_beneath_as_it_is(self):
        flow = stack(3, BOTH_HALVES, "shift", scale=0.25)
        weights = random_probabilities(3, 2).flatten()
        objective = LocalExpectationGradient(temperature=1.0, num_samples=64)
        upper = flow.transforms[1]
        parameters = list(upper.conditioner.parameters())
        y = states(3, 2)
        dimensions = upper.transformed(y)
        logits = upper.logits(y, dimensions)
        expected = torch.zeros(len(y), dtype=torch.double)
        for loc in range(3):
            x = y.index_copy(1, dimensions, (y[:, dimensions] - loc) % 3)
            with torch.no_grad():
                value = flow.base.log_prob(flow.transforms[0].inv(x)).sum(-1)
            expected = expected + logits.softmax(-1)[:, 0, loc] * value
        exact = torch.autograd.grad(weights @ expected, parameters)
        total = sum(objective.learn(flow, 1, 1, y, None, 1).zeros for _ in range(300)) / 300
        found = torch.autograd.grad(weights @ total, parameters)
        exact, found = (torch.cat([part.flatten() for part in parts]) for parts in (exact, found))
        assert torch.cosine_similarity(exact, found, dim=0) > 0.99
        assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.1)

    @pytest.mark.parametrize("bijection", BIJECTIONS)
    def test_it_changes_no_value(self, bijection):
        flow = stack(3, BOTH_HALVES, bijection)
        objective, y = prepared(LocalExpectationGradient(), flow), states(3, 2)
        for progress in (0.0, 0.3, 0.6, 0.9):
            torch.testing.assert_close(objective(flow, y, progress=progress), flow.log_prob(y))

    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_the_first_round_is_layerwise(self, monkeypatch, backbone):
        flow = make_flow(3, 4, [Halves(), Parity()], "affine", backbone)
        y = torch.randint(3, (6, 4))
        one, other = prepared(LocalExpectationGradient(), flow), prepared(Layerwise(), flow)
        for progress in (0.1, 0.7):
            results = []
            for objective, done in ((one, progress / 2), (other, progress)):

                def run(objective=objective, done=done):
                    value = objective(flow, y, progress=done)
                    value.sum().backward()
                    own = {f"own.{name}": grad for name, grad in gradients(objective).items()}
                    return {"value": value.detach()} | gradients(flow) | own

                results.append(expectation(monkeypatch, run))
            assert_gradients_close(*results)


class TestStages:
    def test_every_transform_has_one_of_each_kind(self):
        flow = stack(3, BOTH_HALVES, "rank")
        objective = prepared(LocalExpectationGradient(rounds=2), flow)
        assert objective.num_stages(flow) == 6
        learning = []
        for progress in (*(stage / 6 for stage in range(6)), 1.0):
            frozen = {id(parameter) for parameter in objective.frozen(flow, progress)}
            (waiting,) = [
                n for n in (0, 1) if id(flow.transforms[n].conditioner.head.bias) in frozen
            ]
            learning.append(1 - waiting)
        # The data's side first, three rounds; the last is not left.
        assert learning == [1, 0] * 3 + [0]

    def test_equal_parts_of_the_training(self):
        flow = stack(3, BOTH_HALVES, "rank")
        objective = prepared(LocalExpectationGradient(), flow)
        stages = [objective.stage(flow, done) for done in (0, 0.24, 0.26, 0.5, 0.76, 1.0)]
        assert stages == [0, 0, 1, 2, 3, 3]

    @pytest.mark.parametrize("stage", range(4))
    @pytest.mark.parametrize("bijection", ["rank", "affine"])
    def test_only_the_transform_whose_it_is_learns(self, stage, bijection):
        flow = stack(3, BOTH_HALVES, bijection)
        objective = prepared(LocalExpectationGradient(temperature=3.0), flow)
        progress = (stage + 0.5) / 4
        objective(flow, states(3, 2), progress=progress).sum().backward()
        learns, waits = flow.transforms[1 - stage % 2], flow.transforms[stage % 2]
        assert learns.conditioner.head.weight.grad.abs().sum() > 0
        assert not any(parameter.grad.any() for parameter in waits.parameters())
        frozen = {id(parameter) for parameter in objective.frozen(flow, progress)}
        assert frozen >= {id(parameter) for parameter in waits.parameters()}
        assert not frozen & {id(parameter) for parameter in learns.parameters()}
        if stage >= 2:  # targets are of local losses alone
            assert frozen >= {id(parameter) for parameter in objective.parameters()}


def test_further_rounds_find_what_local_ones_do_not():
    torch.manual_seed(2)
    weights = torch.distributions.Dirichlet(torch.ones(27, dtype=torch.double)).sample()
    orderings = [*BOTH_HALVES, Parity(), Parity(first=1)]
    flow = stack(3, orderings, "rank", length=3)
    objective = prepared(LocalExpectationGradient(num_samples=32), flow)
    y, found = states(3, 3), []
    optimizer = torch.optim.Adam(flow.parameters())
    for step in range(400):
        progress = step / 400
        optimizer.param_groups[0]["lr"] = (0.03 if step < 200 else 0.01) * (1 - step % 50 / 50)
        optimizer.zero_grad()
        (-(weights @ objective(flow, y, progress=progress))).backward()
        for parameter in objective.frozen(flow, progress):
            parameter.grad = None  # what is frozen is not moved by what it learnt before
        optimizer.step()
        if step in (199, 399):
            found.append(float(cross_entropy(flow, weights.reshape(3, 3, 3))))
    assert found[1] < found[0] - 0.002


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds is 0: give at least 1, or train with Layerwise"),
        ({"num_samples": 1}, "num_samples is 1: give at least 2"),
        ({"temperature": 0.0}, "temperature is 0.0: give a positive number"),
        ({"temperature": math.inf}, "give a positive number"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LocalExpectationGradient(**options)


def test_repr_tells_the_options():
    shown = repr(LocalExpectationGradient())
    assert "rounds=1, temperature=0.1, num_samples=8" in shown
