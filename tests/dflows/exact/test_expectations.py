from itertools import product

import pytest
import torch

from dflows import DiscreteFlow, FactorizedBase, PermutationTransform
from dflows.errors import UserError
from dflows.exact import expectations, expected_log_likelihood, mixture_log_likelihood, states
from dflows.gradients import SoftmaxStraightThrough
from dflows.modular import affine_inverse, units
from dflows.orderings import Natural, Parity, Reversed
from tests.dflows.small import make_flow, random_probabilities


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
            monkeypatch.setattr(expectations, "BLOCK_ENTRIES", entries)
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
