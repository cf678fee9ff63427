import copy
from itertools import product

import pytest
import torch

import dflows.exact.gradients as exact
from dflows import DiscreteFlow, FactorizedBase, PermutationTransform
from dflows.errors import UserError
from dflows.exact import states
from dflows.exact.gradients import (
    compare_gradients,
    compare_objectives,
    expected_log_likelihood,
    mixture_log_likelihood,
)
from dflows.gradients import PosteriorRule, ReinMax, SoftmaxStraightThrough
from dflows.modular import affine_inverse, units
from dflows.objectives import EndToEnd, Local, OneAfterAnother
from dflows.orderings import Natural, Parity, Reversed
from dflows.records import METRICS
from tests.dflows.small import (
    OBJECTIVES,
    RULES,
    make_flow,
    prepared,
    random_probabilities,
)


def dense_kernel(transform, num_classes, length):
    """The matrix P(x | y) of one transform, rows y, every choice by itself."""
    y = states(num_classes, length)
    logits = transform.conditioner(y)
    numbers = {tuple(state): number for number, state in enumerate(y.tolist())}
    levels = transform.ordering.levels(length).tolist()
    modulus = getattr(transform.bijection, "modulus", num_classes)
    matrix = torch.zeros(len(y), len(y), dtype=torch.float64)
    for row, state in enumerate(y):
        options = []
        for d in range(length):
            theta, chances = logits[row, d], {}
            scales = units(modulus).tolist() if len(theta) > num_classes else [1]
            if levels[d] == 0:
                chances[int(state[d])] = torch.ones(())
                options.append(chances)
                continue
            of_loc = theta[:modulus].softmax(-1)
            of_scale = theta[modulus:][scales].softmax(-1) if len(scales) > 1 else torch.ones(1)
            for loc, (n, scale) in product(range(modulus), enumerate(scales)):
                x = affine_inverse(
                    state[d], torch.tensor(loc), torch.tensor(scale), num_classes, modulus=modulus
                )
                chances[int(x)] = chances.get(int(x), 0) + of_loc[loc] * of_scale[n]
            options.append(chances)
        for x in product(*options):
            chance = torch.ones(())
            for chances, value in zip(options, x, strict=True):
                chance = chance * chances[value]
            matrix[row, numbers[x]] = chance
    return matrix


class TestExact:
    @pytest.mark.parametrize("bijection", ["shift", "affine", "affine-prime"])
    @pytest.mark.parametrize("num_classes", [3, 4])
    def test_it_is_the_product_of_dense_kernels(self, bijection, num_classes):
        stack = [Natural(), Parity(first=1)]
        flow = make_flow(num_classes, 2, stack, bijection, "causal", "reinmax").double()
        kernels = [dense_kernel(part, num_classes, 2).detach() for part in flow.transforms]
        chances = kernels[1] @ kernels[0]
        torch.testing.assert_close(chances.sum(-1), torch.ones(num_classes**2).double())
        log_prob = flow.base.log_prob(states(num_classes, 2)).sum(-1)
        torch.testing.assert_close(expected_log_likelihood(flow), chances @ log_prob)
        torch.testing.assert_close(mixture_log_likelihood(flow), (chances @ log_prob.exp()).log())

    @pytest.mark.parametrize("function", [expected_log_likelihood, mixture_log_likelihood])
    def test_its_gradient_is_that_of_finite_differences(self, function):
        flow = make_flow(3, 3, [Natural(), Reversed()], rule="reinmax", backbone="causal")
        flow = flow.double()
        weights = random_probabilities(3, 3).flatten()
        (weights @ function(flow)).backward()
        generator = torch.Generator().manual_seed(2)
        step, slope, ends = 1e-5, 0.0, []
        directions = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for p in flow.parameters()
        ]
        for parameter, direction in zip(flow.parameters(), directions, strict=True):
            slope += float((parameter.grad * direction).sum())
        with torch.no_grad():
            for sign in (1, -2):
                for parameter, direction in zip(flow.parameters(), directions, strict=True):
                    parameter.add_(direction, alpha=sign * step)
                ends.append(float(weights @ function(flow)))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)

    def test_in_blocks_it_is_the_same(self, monkeypatch):
        flow = make_flow(3, 3, [Natural(), Parity()], rule="reinmax").double()
        results = []
        for entries in (2**22, 64):
            monkeypatch.setattr(exact, "BLOCK_ENTRIES", entries)
            values = expected_log_likelihood(flow)
            parameters = list(flow.parameters())
            grads = torch.autograd.grad(values.sum(), parameters, materialize_grads=True)
            results.append([values, *grads])
        torch.testing.assert_close(*results)

    def test_the_temperature_is_that_of_the_rule_or_as_asked(self):
        cold, warm = (make_flow(3, 2, [Natural()], "shift", "causal").double() for _ in range(2))
        for flow, temperature in ((cold, 0.1), (warm, 1.0)):
            flow.transforms[0].bijection.rule = SoftmaxStraightThrough(temperature)
            flow.transforms[0].conditioner.head.weight.data.mul_(0.1)  # undecided
        for function in (expected_log_likelihood, mixture_log_likelihood):
            assert not torch.allclose(function(cold), function(warm))
            torch.testing.assert_close(function(cold), function(warm, 0.1))
            torch.testing.assert_close(function(warm), function(cold, 1.0))

    def test_a_permutation_moves_values_alone(self):
        flow = make_flow(3, 3, [Natural()], rule="reinmax").double()
        order = PermutationTransform([1, 2, 0])
        permuted = DiscreteFlow(flow.base, [*flow.transforms, order])
        table = expected_log_likelihood(flow).reshape(3, 3, 3)
        y = states(3, 3)
        x = permuted.transforms[1].inv(y)
        torch.testing.assert_close(expected_log_likelihood(permuted), table[tuple(x.T)])
        back = DiscreteFlow(flow.base, [*flow.transforms, order, order.inv])
        torch.testing.assert_close(expected_log_likelihood(back), table.flatten())

    def test_maps_that_are_chosen_otherwise_are_refused(self):
        with pytest.raises(UserError, match="RankPermutation does not choose its map"):
            expected_log_likelihood(make_flow(bijection="rank"))
        flow = make_flow(rule="posterior")
        inverted = DiscreteFlow(FactorizedBase(3, 4), [flow.transforms[0].inv])
        with pytest.raises(UserError, match="Inverse cannot be enumerated"):
            expected_log_likelihood(inverted)


def compare(rule=None, objective=None, bijection="shift", orderings=None, base=None, **options):
    flow = make_flow(3, 3, orderings or [Natural()], bijection, "causal", "reinmax", base=base)
    if base is not None:
        base.logits.data.copy_(torch.tensor([[30.0, 0.0, 0.0]]))
    with torch.no_grad():  # undecided: near a certain choice all gradients look alike
        for transform in flow.transforms:
            transform.conditioner.head.weight.mul_(0.1)
    named = {"one": (rule, objective or EndToEnd())}
    probabilities = random_probabilities(3, 3)
    return compare_objectives(flow, named, probabilities, **options)["one"]


class TestComparison:
    @pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
    def test_straight_through_is_exact_for_one_choice_next_to_the_base(self, temperature):
        one = compare(SoftmaxStraightThrough(temperature))
        assert (one.cosine, one.norm_ratio) == pytest.approx((1, 1), abs=1e-9)
        assert one.mixture_cosine < 0.999
        assert (one.draws, one.standard_error) == (1, 0)

    def test_of_two_choices_it_takes_the_other_as_made(self):
        assert compare(SoftmaxStraightThrough(1.0), bijection="affine").cosine < 0.99

    def test_the_posterior_rule_is_exact_for_the_mixture_next_to_the_base(self):
        one = compare(PosteriorRule())
        assert (one.mixture_cosine, one.mixture_norm_ratio) == pytest.approx((1, 1), abs=1e-9)
        assert one.cosine < 0.999

    @pytest.mark.parametrize("objective", [Local(), OneAfterAnother(Local(), EndToEnd())], ids=repr)
    def test_the_local_objective_is_that_of_the_mixture_on_a_base_of_class_0(self, objective):
        cold = SoftmaxStraightThrough(0.1)  # of no matter: it is no rule that trains
        one = compare(cold, objective, base=FactorizedBase(3, 3, sharing="levels"))
        assert (one.mixture_cosine, one.mixture_norm_ratio) == pytest.approx((1, 1), abs=1e-4)

    @pytest.mark.parametrize("bijection", ["shift", "affine"])
    def test_reinmax_is_unbiased_for_one_flow(self, bijection):
        one = compare(ReinMax(), bijection=bijection, draws=400, batches=2)
        assert one.draws == 400
        assert 0 < one.standard_error < 0.15
        assert abs(one.norm_ratio - 1) < 4 * one.standard_error
        assert 1 - one.cosine < 8 * one.standard_error**2

    def test_two_flows_bias_all_but_the_expectation(self):
        for rule in (SoftmaxStraightThrough(1.0), PosteriorRule()):
            one = compare(rule, orderings=[Natural(), Reversed()])
            assert one.cosine < 0.99
            assert one.mixture_cosine < 0.999

    def test_the_variance_is_that_of_independent_examples(self):
        flow = make_flow(3, 2, [Natural()], "shift", "causal", "posterior").double()
        probabilities = random_probabilities(3, 2)
        rows = []
        for y in states(3, 2):
            parameters = list(flow.transforms[0].conditioner.parameters())
            grads = torch.autograd.grad(
                flow.log_prob(y), parameters, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([grad.flatten() for grad in grads]))
        rows, weights = torch.stack(rows), probabilities.flatten()
        variance = weights @ rows.square().sum(-1) - (weights @ rows).square().sum()
        flow.zero_grad()
        (weights @ expected_log_likelihood(flow)).backward()
        size = sum(
            p.grad.square().sum()
            for p in flow.transforms[0].conditioner.parameters()
            if p.grad is not None
        )
        one = compare_gradients(flow, EndToEnd(), probabilities, batch_size=5, batches=600)
        assert one.variance == pytest.approx(float(variance / size) / 5, rel=0.15)
        half = compare_gradients(flow, EndToEnd(), probabilities, batch_size=10, batches=600)
        assert half.variance == pytest.approx(one.variance / 2, rel=0.2)

    @pytest.mark.parametrize(
        ("backbone", "sampled"),
        [
            ("causal", {"gumbel", "reinmax", "local-transforms"}),
            (
                "masked",
                {"gumbel", "reinmax", "local-transforms", "local-levels", "layerwise"}
                | {"local-expectation"},
            ),
        ],
    )
    def test_all_are_compared_at_the_same_parameters(self, backbone, sampled):
        flow = make_flow(3, 3, [Natural(), Parity()], backbone=backbone, rule="posterior")
        objectives = {name: (make(), EndToEnd()) for name, make in RULES.items()}
        objectives |= {name: (None, make()) for name, make in OBJECTIVES.items()}
        before, local = copy.deepcopy(flow), objectives["local"][1]
        state = torch.random.get_rng_state()
        probabilities = random_probabilities(3, 3)
        options = {"batch_size": 8, "draws": 3, "batches": 3}
        compared = compare_objectives(flow, objectives, probabilities, **options)
        assert torch.equal(state, torch.random.get_rng_state())
        assert compared.keys() == objectives.keys()
        assert {name for name, one in compared.items() if one.draws == 3} == sampled
        for one in compared.values():
            assert one.metrics.keys() <= METRICS.keys()
            assert one.variance > 0
        again = compare_gradients(flow, EndToEnd(), probabilities, **options)
        assert again == compared["posterior"] == compared["end-to-end"]
        for (name, one), other in zip(flow.named_parameters(), before.parameters(), strict=True):
            assert torch.equal(one, other), name
            assert one.grad is None
        assert flow.training
        assert not local.targets  # it is a copy that was prepared
        assert isinstance(flow.transforms[0].bijection.rule, PosteriorRule)

    @pytest.mark.parametrize("where", ["alone", "before another", "after another"])
    def test_a_trained_target_is_kept(self, where):
        stack, probabilities = [Natural(), Parity()], random_probabilities(3, 3)
        flow = make_flow(3, 3, stack, backbone="causal")
        options = {"batch_size": 8, "batches": 2}
        trained = local = prepared("local", flow)
        with torch.no_grad():
            for number, target in local.targets.items():
                target.copy_(torch.tensor([0.0, 1.0, -2.0]).roll(int(number)))
        if where != "alone":
            parts = (local, EndToEnd()) if where == "before another" else (EndToEnd(), local)
            trained = OneAfterAnother(*parts)
        new = {"local": (None, Local()), "end-to-end": (None, EndToEnd())}
        compared = compare_objectives(flow, new, probabilities, trained=trained, **options)
        assert compared["local"] == compare_gradients(flow, local, probabilities, **options)
        assert compared["local"] != compare_gradients(flow, Local(), probabilities, **options)

    def test_what_cannot_be_compared_is_refused(self):
        flow = make_flow(3, 3)
        with pytest.raises(UserError, match=r"those of 9 states, and the flow has 27.*\(3,\) \* 3"):
            compare_gradients(flow, EndToEnd(), random_probabilities(3, 2))
        flat = copy.deepcopy(flow)
        flat.base.logits.data.zero_()
        with pytest.raises(UserError, match="exact gradient is 0"):
            compare_gradients(flat, EndToEnd(), random_probabilities(3, 3))
        rank = make_flow(3, 3, bijection="rank")
        for name in RULES:
            named = {name: (RULES[name](), EndToEnd())}
            with pytest.raises(UserError, match="RankPermutation"):
                compare_objectives(rank, named, random_probabilities(3, 3))
