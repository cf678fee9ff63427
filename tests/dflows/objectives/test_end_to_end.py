"""The likelihood end to end: the gradient of each bijection's rule, against dense references."""

import pytest
import torch

from dflows import DiscreteFlow, PermutationTransform
from dflows.bases import AutoregressiveBase, NGramBase
from dflows.errors import UserError
from dflows.objectives import EndToEnd
from dflows.orderings import Natural, Parity, Strided
from tests.dflows.objectives.references import dense_log_prob, mixture
from tests.dflows.small import (
    BIJECTIONS,
    RULES,
    assert_gradients_close,
    expectation,
    gradients,
    make_conditioner,
    make_flow,
    prepared,
    shaken,
    states,
)

STACK = [Strided(columns=3), Natural(), Parity(first=1)]
SOFTMAX = [name for name in BIJECTIONS if name != "rank"]
CASES = [(name, rule) for name in SOFTMAX for rule in RULES] + [("rank", "straight-through")]


class TestGradient:
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    @pytest.mark.parametrize("number", [1, 2, 3])
    @pytest.mark.parametrize(("bijection", "rule"), CASES)
    def test_it_is_that_of_the_rules(self, bijection, rule, number, backbone):
        flow = make_flow(4, 4, STACK[:number], bijection, backbone, rule).double()
        y = torch.randint(4, (5, 4))
        results = []
        for function in (flow.log_prob, lambda y: dense_log_prob(flow, y)):
            torch.manual_seed(1)
            log_prob = function(y)
            log_prob.sum().backward()
            results.append({"value": log_prob.detach()} | gradients(flow))
        assert_gradients_close(*results, rtol=1e-9, atol=1e-9)
        learnt = [name for name, grad in results[0].items() if grad.any()]
        for n in range(number):
            assert any(name.startswith(f"transforms.{n}.conditioner.head") for name in learnt)

    @pytest.mark.parametrize("rule", RULES)
    def test_rules_of_a_stack_may_differ(self, rule):
        flow = make_flow(4, 4, STACK[:2], "affine", rule=rule)
        flow.transforms[1].bijection.rule = RULES["posterior"]()
        flow = flow.double()
        y, results = torch.randint(4, (5, 4)), []
        for function in (flow.log_prob, lambda y: dense_log_prob(flow, y)):
            torch.manual_seed(1)
            function(y).sum().backward()
            results.append(gradients(flow))
        assert_gradients_close(*results, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize(("bijection", "rule"), CASES)
    def test_that_of_log_prob_is_that_of_the_objective(self, bijection, rule, training):
        flow = make_flow(4, 5, STACK, bijection, rule=rule).train(training)
        y, results = torch.randint(4, (2, 3, 5)), []
        for function in (flow.log_prob, lambda y: EndToEnd()(flow, y)):
            torch.manual_seed(1)
            value = function(y)
            (-value.mean()).backward()
            results.append({"value": value.detach()} | gradients(flow))
        assert_gradients_close(*results, rtol=0, atol=0)

    @pytest.mark.parametrize("bijection", SOFTMAX)
    def test_means_accumulation_and_loss_scaling_scale_it_and_nothing_else(self, bijection):
        flow = make_flow(5, 4, bijection=bijection, rule="posterior").double()
        y = torch.randint(5, (8, 4))
        (-flow.log_prob(y).sum()).backward()
        plain = gradients(flow)
        for factor, losses in (
            (1 / 8, [-flow.log_prob(y).mean()]),  # a batch mean
            (1 / 8, [-EndToEnd()(flow, part).mean() / 4 for part in y.split(2)]),  # accumulation
            (1024.0, [-1024 * flow.log_prob(y).sum()]),  # loss scaling
            (-0.3, [0.3 * flow.log_prob(y).sum()]),  # descent in place of ascent
        ):
            for loss in losses:
                loss.backward()
            scaled = {name: grad / factor for name, grad in gradients(flow).items()}
            assert_gradients_close(scaled, plain, rtol=1e-5, atol=1e-7)

    def test_weights_of_examples_weigh_their_gradients(self):
        flow = make_flow(5, 4, rule="posterior").double()
        y, weight = torch.randint(5, (3, 4)), torch.tensor([0.5, 0.0, 3.0])
        (EndToEnd()(flow, y) * weight).sum().backward()
        actual = gradients(flow)
        for row, factor in zip(y, weight, strict=True):
            if factor:
                (factor * flow.log_prob(row)).backward()
        assert_gradients_close(actual, gradients(flow), rtol=1e-6, atol=1e-8)


class TestNextToTheBase:
    @pytest.mark.parametrize("ordering", [Parity(), Natural(), Strided(columns=3)], ids=str)
    @pytest.mark.parametrize("bijection", ["shift", "affine", "affine-prime"])
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    @pytest.mark.parametrize("num_classes", [3, 4])
    def test_the_posterior_rule_has_the_true_gradient_of_the_mixture(
        self, ordering, bijection, backbone, num_classes
    ):
        flow = make_flow(num_classes, 4, [ordering], bijection, backbone, "posterior").double()
        y = torch.randint(num_classes, (7, 4))
        flow.log_prob(y).sum().backward()
        actual = gradients(flow.transforms[0])
        mixture(flow, y).backward()
        assert_gradients_close(actual, gradients(flow.transforms[0]))

    def test_over_all_states_too(self):
        flow = make_flow(3, 2, [Parity()], "shift", rule="posterior").double()
        y = states(3, 2)
        flow.log_prob(y).sum().backward()
        actual = gradients(flow.transforms[0])
        mixture(flow, y).backward()
        assert_gradients_close(actual, gradients(flow.transforms[0]))

    def test_straight_through_ascends_the_expected_log_likelihood(self):
        flow = make_flow(orderings=[Parity()], bijection="shift").double()
        flow.transforms[0].bijection.rule.temperature = 1.0
        y = torch.randint(3, (7, 4))
        flow.log_prob(y).sum().backward()
        actual = gradients(flow.transforms[0])
        mixture(flow, y, of_logs=True).backward()
        assert_gradients_close(actual, gradients(flow.transforms[0]))

    @pytest.mark.parametrize("rule", ["gumbel", "reinmax"])
    def test_a_mean_over_sampled_maps_is_the_expected_log_likelihood(self, rule):
        flow = make_flow(3, 4, [Parity()], "shift", rule=rule)
        y = torch.randint(3, (5, 4))
        with torch.no_grad():
            expected = mixture(flow, y, of_logs=True)
            untouched = flow.base.log_prob(y)[:, [0, 2]].sum()
        torch.manual_seed(1)
        sampled = EndToEnd()(flow, y.expand(20_000, 5, 4)).mean(0).sum().detach()
        torch.testing.assert_close(sampled, expected + untouched, rtol=0, atol=0.05)


class TestLevels:
    @pytest.mark.parametrize("bijection", ["affine", "rank"])
    def test_sampled_levels_of_a_base_are_unbiased_below_a_context(self, monkeypatch, bijection):
        # On one-hot vectors every level of the base is evaluated, for each hands on a gradient.
        base = AutoregressiveBase(make_conditioner(3, 4, Strided(columns=3)))
        flow = make_flow(3, 4, [Parity()], bijection, base=base)
        y, results = torch.randint(3, (5, 4)), []
        for subsample in ("levels", "none"):

            def run(subsample=subsample):
                value = EndToEnd(subsample)(flow, y)
                value.sum().backward()
                return {"value": value.detach()} | gradients(flow)

            results.append(expectation(monkeypatch, run))
        assert_gradients_close(*results, rtol=1e-4, atol=1e-5)

    def test_they_are_unbiased_without_transforms(self, monkeypatch):
        flow = shaken(DiscreteFlow(AutoregressiveBase(make_conditioner(3, 4, Strided(columns=3)))))
        y, results = torch.randint(3, (5, 4)), []
        assert not torch.allclose(EndToEnd("levels")(flow, y), flow.log_prob(y))
        for subsample in ("levels", "none"):

            def run(subsample=subsample):
                value = EndToEnd(subsample)(flow, y)
                value.sum().backward()
                return {"value": value.detach()} | gradients(flow)

            results.append(expectation(monkeypatch, run))
        assert_gradients_close(*results, rtol=1e-4, atol=1e-5)


def test_a_permutation_between_transforms_hands_the_gradient_on():
    flow = make_flow(3, 4, [Strided(columns=3), Parity(first=1)], "affine")
    stack = list(flow.transforms)
    stack.insert(1, PermutationTransform([2, 0, 3, 1]))
    flow = DiscreteFlow(flow.base, stack)
    flow.log_prob(torch.randint(3, (20, 4))).sum().backward()
    assert all(parameter.grad.any() for parameter in flow.parameters())


class TestRefused:
    def test_a_base_that_hands_on_no_gradient(self):
        objective = EndToEnd()
        objective.prepare(DiscreteFlow(NGramBase(3, 4)))
        objective.prepare(DiscreteFlow(NGramBase(3, 4), [PermutationTransform([1, 0, 3, 2])]))
        (transform,) = make_flow(3, 4, [Parity()]).transforms
        for part in (transform, transform.inv):
            with pytest.raises(UserError, match="NGramBase has none: train with Local"):
                objective.prepare(DiscreteFlow(NGramBase(3, 4), [part]))

    def test_another_subset(self):
        with pytest.raises(UserError, match="subsample is 'transforms': give 'none', 'levels'"):
            EndToEnd("transforms")


def test_it_has_no_stages():
    flow = make_flow()
    objective = prepared(EndToEnd(), flow)
    assert objective.num_stages(flow) == 1
    assert objective.frozen(flow, None) == []
    assert objective.end_to_end(None)
    assert not list(objective.parameters())
    assert repr(objective) == "EndToEnd(subsample='none')"
