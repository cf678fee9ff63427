import math
from itertools import product

import pytest
import torch

from dflows import DiscreteFlow, FactorizedBase
from dflows.errors import NonFiniteError, UserError
from dflows.exact import (
    MOST_STATES,
    check_enumerable,
    cross_entropy,
    divergence,
    entropy,
    expected_loss,
    factorized_entropy,
    marginals,
    probabilities,
    share_of_gap,
    states,
)
from tests.dflows.small import make_flow


def dirichlet(*shape, seed=0):
    """A random distribution."""
    generator = torch.Generator().manual_seed(seed)
    table = -torch.rand(shape, generator=generator, dtype=torch.float64).log()
    return table / table.sum()


def independent(*rows):
    """The distribution of independent dimensions."""
    table = torch.ones((), dtype=torch.float64)
    for row in rows:
        table = table.unsqueeze(-1) * torch.tensor(row, dtype=torch.float64)
    return table


class TestStates:
    @pytest.mark.parametrize(("num_classes", "length"), [(2, 1), (2, 5), (3, 4), (7, 2)])
    def test_all_in_the_order_of_their_digits(self, num_classes, length):
        expected = torch.tensor(list(product(range(num_classes), repeat=length)))
        assert torch.equal(states(num_classes, length), expected)
        assert torch.equal(states(num_classes, length, 1, 4), expected[1:4])

    @pytest.mark.parametrize(
        ("num_classes", "length", "message"),
        [(1, 3, "num_classes is 1"), (3, 0, "length is 0"), (10, 8, "states, too many")],
    )
    def test_what_cannot_be_enumerated_is_refused(self, num_classes, length, message):
        with pytest.raises(UserError, match=message):
            states(num_classes, length)

    def test_the_largest(self):
        check_enumerable(MOST_STATES, 1)
        with pytest.raises(UserError, match="50,000,000"):
            check_enumerable(MOST_STATES + 1, 1)
        with pytest.raises(UserError, match="more than 50,000,000 states"):
            check_enumerable(2, 10**9)  # at once, without the number of them


class TestEntropies:
    def test_of_the_uniform_distribution(self):
        table = torch.full((3, 3), 1 / 9, dtype=torch.float64)
        assert entropy(table) == pytest.approx(math.log(9))
        assert factorized_entropy(table) == pytest.approx(math.log(9))

    def test_of_independent_dimensions(self):
        table = independent([0.2, 0.8], [0.5, 0.5], [0.9, 0.1])
        assert factorized_entropy(table) == pytest.approx(entropy(table))
        expected = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
        torch.testing.assert_close(marginals(table), expected)

    def test_of_one_dimension(self):
        table = torch.tensor([0.5, 0.0, 0.5])
        assert torch.equal(marginals(table), table.double().unsqueeze(0))
        assert entropy(table) == factorized_entropy(table) == pytest.approx(math.log(2))

    def test_marginals_are_sums_over_the_other_dimensions(self):
        table = dirichlet(4, 4, 4)
        expected = torch.stack([table.sum((1, 2)), table.sum((0, 2)), table.sum((0, 1))])
        torch.testing.assert_close(marginals(table), expected)

    @pytest.mark.parametrize("measure", [entropy, factorized_entropy, marginals])
    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (torch.full((2, 3), 1 / 6), r"shape \(2, 3\)"),
            (torch.ones(()), r"shape \(\)"),
            (torch.ones(1, 1), "num_classes is 1"),
            (torch.ones(2, 2), "sum to 4"),
            (torch.tensor([1.5, -0.5]), "smallest is -0.5"),
            (torch.tensor([math.nan, 1.0]), "sum to nan"),
        ],
    )
    def test_what_is_no_table_is_refused(self, measure, table, message):
        with pytest.raises(UserError, match=message):
            measure(table)


class TestFlows:
    @pytest.mark.parametrize("block_size", [1, 7, 1000])
    def test_probabilities(self, block_size):
        flow = make_flow(3, 4).double()
        table = probabilities(flow, block_size)
        assert table.shape == (3, 3, 3, 3)
        assert float(table.sum()) == pytest.approx(1)
        torch.testing.assert_close(table.flatten(), flow.log_prob(states(3, 4)).exp().detach())

    @pytest.mark.parametrize("block_size", [1, 7, 1000])
    def test_cross_entropy(self, block_size):
        flow, table = make_flow(3, 4).double(), dirichlet(3, 3, 3, 3)
        expected = -float((table * probabilities(flow).log()).sum())
        assert cross_entropy(flow, table, block_size) == pytest.approx(expected, abs=1e-12)

    def test_the_divergence_is_0_from_the_flow_itself_alone(self):
        flow = make_flow(3, 4).double()
        assert divergence(flow, probabilities(flow)) == pytest.approx(0, abs=1e-12)
        assert divergence(flow, dirichlet(3, 3, 3, 3)) > 0

    def test_states_of_no_probability_are_not_scored(self):
        flow = DiscreteFlow(FactorizedBase(2, 2, sharing="positions"))
        with torch.no_grad():
            flow.base.logits[0] = torch.tensor([0.0, -math.inf])
        expected = -0.5 * flow.base.logits[1].detach().log_softmax(-1).sum()
        table = torch.tensor([[0.5, 0.5], [0, 0]])
        assert cross_entropy(flow, table) == pytest.approx(float(expected))
        assert cross_entropy(flow, torch.full((2, 2), 0.25)) == math.inf
        assert probabilities(flow)[1].tolist() == [0, 0]

    @pytest.mark.parametrize("wrong", [math.nan, math.inf])
    def test_a_diverged_model_has_no_loss(self, wrong):
        model = make_flow(3, 4).train()
        with pytest.raises(NonFiniteError, match=f"DiscreteFlow gives 81 of 81.*{wrong}"):
            expected_loss(model, lambda y: torch.full((len(y),), wrong), dirichlet(3, 3, 3, 3))
        assert model.training
        model.transforms[0].conditioner.head.bias.data.fill_(wrong)
        with pytest.raises(NonFiniteError, match="ModularAffine"):
            cross_entropy(model, dirichlet(3, 3, 3, 3))

    def test_mode_and_gradients_are_left_alone(self):
        flow = make_flow(3, 4)
        flow.base.eval()
        cross_entropy(flow, dirichlet(3, 3, 3, 3))
        assert flow.training
        assert not flow.base.training
        assert all(parameter.grad is None for parameter in flow.parameters())

    def test_a_table_of_another_shape_is_refused(self):
        with pytest.raises(UserError, match=r"give \(3, 3, 3, 3\)"):
            cross_entropy(make_flow(3, 4), dirichlet(3, 3, 3))

    def test_a_flow_that_cannot_be_enumerated_is_refused(self):
        with pytest.raises(UserError, match="too many to enumerate"):
            probabilities(DiscreteFlow(FactorizedBase(27, 64)))

    def test_an_empty_block_is_refused(self):
        with pytest.raises(UserError, match="block_size is 0"):
            probabilities(make_flow(3, 4), block_size=0)


class TestShareOfGap:
    def test_of_the_ends_and_beyond(self):
        table = dirichlet(3, 3)
        ends = entropy(table), factorized_entropy(table)
        assert share_of_gap(ends[0], *ends) == 1
        assert share_of_gap(ends[1], *ends) == 0
        assert share_of_gap(ends[1] + 1, *ends) < 0

    def test_of_independent_dimensions_is_refused(self):
        table = independent([0.2, 0.8], [0.5, 0.5])
        with pytest.raises(UserError, match="no gap"):
            share_of_gap(1.0, entropy(table), factorized_entropy(table))
