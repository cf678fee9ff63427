"""Flows in turn, by themselves and then jointly: policies, their gradient, and whose turn it is."""

import itertools
import math

import pytest
import torch

from dflows import DiscreteFlow, FactorizedBase
from dflows.backbones import Table
from dflows.bijections import MatchedAffine, ModularAffine, ModularShift, RankPermutation
from dflows.errors import UserError
from dflows.estimators import JointInTurn
from dflows.exact import cross_entropy, expected_log_likelihood
from dflows.orderings import Halves, Parity
from dflows.transforms import ConditionalTransform
from tests.dflows.small import random_probabilities, shaken, states

BIJECTIONS = [ModularShift, ModularAffine, MatchedAffine, RankPermutation]


def stack(num_classes, orderings, bijection, length=2, **options):
    torch.manual_seed(0)
    transforms = [
        ConditionalTransform(
            length,
            bijection(num_classes),
            ordering,
            Table(4, num_classes, length),
            JointInTurn(**options),
        )
        for ordering in orderings
    ]
    flow = DiscreteFlow(FactorizedBase(num_classes, length), transforms)
    return shaken(flow).double()


def plackett_luce(logits):
    """The probability of every order of choices without replacement."""
    weights = logits.exp().tolist()
    chances = {}
    for order in itertools.permutations(range(len(weights))):
        left, chance = sum(weights), 1.0
        for choice in order:
            chance *= weights[choice] / left
            left -= weights[choice]
        chances[order] = chance
    return chances


class TestPolicy:
    def test_orders_of_ranks_are_drawn_without_replacement(self):
        torch.manual_seed(0)
        logits, temperature = torch.tensor([0.3, -0.2, 0.1], dtype=torch.double), 0.5
        expected = plackett_luce(logits / temperature)
        drawn = {}
        for _ in range(200):
            x, log_prob = RankPermutation(3).draw_inverse(
                torch.tensor([0]), logits[None], 100, temperature
            )
            for rank, chance in zip(x[:, 0].tolist(), log_prob[:, 0].exp().tolist(), strict=True):
                drawn.setdefault(rank, []).append(chance)
        counts = {rank: len(chances) / 20_000 for rank, chances in drawn.items()}
        for rank, share in counts.items():
            exact = sum(chance for order, chance in expected.items() if order.index(0) == rank)
            assert share == pytest.approx(exact, abs=4 * (exact / 20_000) ** 0.5)
        found = {round(chance, 9) for chances in drawn.values() for chance in chances}
        assert found == {round(chance, 9) for chance in expected.values()}

    @pytest.mark.parametrize("bijection", BIJECTIONS[:3])
    def test_maps_are_drawn_from_the_softmax(self, bijection):
        torch.manual_seed(0)
        made = bijection(3)
        logits = torch.randn(1, made.num_logits)
        y = torch.tensor([1])
        x, log_prob = made.draw_inverse(y, logits, 20_000, 1.5)
        assert x.shape == log_prob.shape == (20_000, 1)
        # A map is drawn as often as its probability says, and there are no others.
        chances, counts = log_prob.exp().flatten().unique(return_counts=True)
        assert chances.max() <= 1
        for chance, count in zip(chances.tolist(), counts.tolist(), strict=True):
            maps = round(count / 20_000 / chance)
            assert maps >= 1
            error = 5 * (maps * chance / 20_000) ** 0.5
            assert count / 20_000 == pytest.approx(maps * chance, abs=error)

    @pytest.mark.parametrize("bijection", [ModularShift, ModularAffine])
    @pytest.mark.parametrize("temperature", [0.7, 2.0])
    def test_its_mean_gradient_is_that_of_the_expectation(self, bijection, temperature):
        flow = stack(3, [Halves()], bijection, temperature=temperature, draws=64)
        (transform,) = flow.transforms
        weights = random_probabilities(3, 2).flatten()

        class AtTemperature(JointInTurn):
            map_temperature = temperature

        transform.estimator = AtTemperature(temperature=temperature, draws=64)
        parameters = list(transform.conditioner.parameters())
        exact = torch.autograd.grad(weights @ expected_log_likelihood(flow), parameters)
        y = states(3, 2)
        total = torch.zeros(len(y), dtype=torch.double)
        for _ in range(300):
            total = total + transform.policy(y, flow._beneath(0), None)[1] / 300
        found = torch.autograd.grad(weights @ total, parameters)
        exact, found = (torch.cat([part.flatten() for part in parts]) for parts in (exact, found))
        assert torch.cosine_similarity(exact, found, dim=0) > 0.995
        assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.05)

    @pytest.mark.parametrize("bijection", BIJECTIONS)
    def test_it_changes_no_value(self, bijection):
        flow = stack(3, [Halves(), Halves(first=1)], bijection, steps=1)
        y = states(3, 2)
        for step in range(4):
            flow.at_step(step)
            torch.testing.assert_close(flow.objective(y), flow.log_prob(y))


class TestTurns:
    def test_every_flow_has_a_turn_of_each_kind(self):
        flow = stack(3, [Halves(), Halves(first=1)], RankPermutation, steps=5, rounds=2)
        seen = []
        for step in range(0, 40, 5):
            flow.at_step(step)
            (waiting,) = flow.waiting
            seen.append("base" if waiting is flow.transforms[1] else "data")
        # The data's side first, three rounds; then the last goes on.
        assert seen == ["data", "base"] * 3 + ["base"] * 2

    def test_equal_parts_of_the_training(self):
        flow = stack(3, [Halves(), Halves(first=1)], RankPermutation)
        turns = []
        for progress in (0, 0.24, 0.26, 0.5, 0.76, 1.0):
            flow.at_step(0, progress)
            turns.append(flow._turn)
        assert turns == [0, 0, 1, 2, 3, 3]

    @pytest.mark.parametrize("step", range(4))
    def test_only_the_flow_whose_turn_it_is_learns(self, step):
        flow = stack(3, [Halves(), Halves(first=1)], RankPermutation, steps=1, temperature=3.0)
        flow.at_step(step)
        flow.objective(states(3, 2)).sum().backward()
        learns = flow.transforms[1 - step % 2]
        assert learns.conditioner.head.weight.grad.abs().sum() > 0
        (waiting,) = flow.waiting
        assert waiting is not learns
        assert not waiting.conditioner.head.weight.grad.any()


def test_joint_turns_find_what_local_ones_do_not():
    torch.manual_seed(2)
    weights = torch.distributions.Dirichlet(torch.ones(27, dtype=torch.double)).sample()
    orderings = [Halves(), Halves(first=1), Parity(), Parity(first=1)]
    flow = stack(3, orderings, RankPermutation, length=3, steps=100, draws=32)
    y, found = states(3, 3), []
    optimizer = torch.optim.Adam(flow.parameters())
    for step in range(800):
        flow.at_step(step)
        optimizer.param_groups[0]["lr"] = (0.03 if step < 400 else 0.01) * (1 - step % 100 / 100)
        optimizer.zero_grad()
        (-(weights @ flow.objective(y))).backward()
        for transform in flow.waiting:
            transform.zero_grad()  # what only waits is not moved by what it learnt before
        optimizer.step()
        if step in (399, 799):
            found.append(float(cross_entropy(flow, weights.reshape(3, 3, 3))))
    assert found[1] < found[0] - 0.002


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds is 0: give at least 1"),
        ({"draws": 1}, "draws is 1: give at least 2"),
        ({"temperature": 0.0}, "temperature is 0.0: give a positive number"),
        ({"temperature": math.inf}, "give a positive number"),
        ({"steps": 0}, "steps is 0: give at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        JointInTurn(**options)


def test_repr_tells_the_options():
    flow = stack(3, [Halves()], RankPermutation)
    assert repr(flow.transforms[0].estimator) == (
        "JointInTurn(steps=None, rounds=1, temperature=0.1, draws=8)"
    )
