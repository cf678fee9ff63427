import pytest
import torch

from dflows.bases import FactorizedBase
from dflows.errors import UserError
from dflows.orderings import Natural, Parity, Strided
from dflows.representations import to_one_hot
from tests.dflows.small import shaken, states


@pytest.mark.parametrize("sharing", ["levels", "positions"])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_it_is_the_product_of_its_dimensions(sharing, length):
    base = shaken(FactorizedBase(3, 4, [Parity()], sharing))
    x = states(3, length)
    log_prob = base.log_prob(x)
    probs = base.logits.softmax(-1)
    for d in range(length):
        expected = probs[base.groups[d]][x[:, d]]
        torch.testing.assert_close(log_prob[:, d].exp(), expected)
    torch.testing.assert_close(log_prob.sum(-1).exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(base.log_prob(to_one_hot(x, 3)), log_prob)
    torch.testing.assert_close(base.objective(x), log_prob.sum(-1))
    weight = torch.rand(x.shape)
    torch.testing.assert_close(base.objective(x, None, weight), (weight * log_prob).sum(-1))


@pytest.mark.parametrize(
    ("orderings", "groups"),
    [
        ([], [0, 0, 0, 0, 0]),
        ([Strided(columns=2)], [0, 1, 0, 1, 0]),
        ([Strided(columns=3), Parity()], [0, 3, 4, 1, 2]),
        ([Natural()], [0, 1, 2, 3, 4]),
    ],
)
def test_dimensions_that_flows_treat_alike_share(orderings, groups):
    base = FactorizedBase(3, 5, orderings)
    assert base.groups.tolist() == groups
    assert base.logits.shape == (max(groups) + 1, 3)
    assert FactorizedBase(3, 5, orderings, "positions").groups.tolist() == [0, 1, 2, 3, 4]


def test_sharing_is_one_of_two():
    with pytest.raises(UserError, match="'levels' or 'positions'"):
        FactorizedBase(3, 5, sharing="none")


class TestStart:
    @pytest.mark.parametrize("sharing", ["levels", "positions"])
    def test_transformed_dimensions_start_peaked_and_others_at_the_marginal(self, sharing):
        base = FactorizedBase(4, 5, [Parity()], sharing)
        base.start(torch.tensor([9, 19, 29, 39]))
        for d in range(5):
            probs = base.logits.softmax(-1)[base.groups[d]]
            expected = [0.1, 0.2, 0.3, 0.4] if d % 2 == 0 else [1 / 2, 1 / 6, 1 / 6, 1 / 6]
            torch.testing.assert_close(probs, torch.tensor(expected))

    def test_without_flows_all_start_at_the_marginal(self):
        base = FactorizedBase(3, 5)
        base.start(torch.tensor([0, 1, 6]))
        torch.testing.assert_close(base.logits.softmax(-1), torch.tensor([[0.1, 0.2, 0.7]]))

    def test_counts_may_be_those_of_every_dimension(self):
        counts = torch.tensor([[8, 0], [3, 5], [0, 8]])
        base = FactorizedBase(2, 3, sharing="positions")
        base.start(counts)
        torch.testing.assert_close(
            base.logits.softmax(-1), torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9]])
        )
        base = FactorizedBase(2, 3)
        base.start(counts)  # one group: the mean of its dimensions
        torch.testing.assert_close(base.logits.softmax(-1), torch.tensor([[1.4, 1.6]]) / 3)


class TestRefit:
    @pytest.mark.parametrize("sharing", ["levels", "positions"])
    def test_it_is_the_most_likely_distribution(self, sharing):
        base = shaken(FactorizedBase(3, 4, [Parity()], sharing))
        x = torch.randint(3, (500, 4)).clamp(max=torch.tensor([0, 2, 2, 2]))
        x[:10, 0] = torch.arange(10) % 3
        base.refit(base.count(x), smoothing=0)
        best = base.log_prob(x).sum().detach()
        for group in base.groups.unique():
            values = x[:, base.groups == group]
            frequency = values.flatten().bincount(minlength=3) / values.numel()
            torch.testing.assert_close(base.logits[group].softmax(-1), frequency)
        for seed in range(5):
            assert shaken(base, seed, 0.05).log_prob(x).sum() < best
        # Likelihood is stationary there.
        base.refit(base.count(x), smoothing=0)
        base.log_prob(x).sum().backward()
        assert base.logits.grad.abs().max() < 1e-3

    def test_counts_add_up_over_batches_and_shorter_events(self):
        base = FactorizedBase(3, 4, [Parity()])
        x = torch.randint(3, (7, 4))
        total = base.count(x[:3]) + base.count(x[3:])
        assert torch.equal(total, base.count(x))
        assert total.sum() == 28
        assert base.count(x[:, :1]).sum(-1).tolist() == [7, 0]

    def test_weights_count_as_often(self):
        base = FactorizedBase(3, 4, sharing="positions")
        x = torch.randint(3, (7, 4))
        weight = torch.randint(3, (7, 4))
        repeated = sum(base.count(x[n : n + 1], weight[n : n + 1]) for n in range(7))
        assert torch.equal(base.count(x, weight), repeated)
        assert base.count(x, weight).sum() == weight.sum()

    def test_groups_that_were_never_counted_are_left_alone(self):
        base = shaken(FactorizedBase(3, 4, [Parity()]))
        before = base.logits.clone()
        base.refit(base.count(torch.randint(3, (5, 1))))
        assert torch.equal(base.logits[1], before[1])
        assert base.logits.isfinite().all()


class TestSample:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_frequencies_are_the_probabilities(self, temperature):
        base = shaken(FactorizedBase(4, 3, sharing="positions"), scale=1.0)
        base.logits.data[1, 2] = -torch.inf
        x = base.sample(40_000, 3, temperature=temperature)
        probs = (base.logits / temperature).softmax(-1).detach()
        for d in range(3):
            frequency = x[:, d].bincount(minlength=4) / len(x)
            torch.testing.assert_close(frequency, probs[d], rtol=0, atol=0.01)
        assert not (x[:, 1] == 2).any()

    def test_a_generator_decides_and_lengths_may_be_shorter(self):
        base = shaken(FactorizedBase(4, 3))
        one, two = (base.sample(5, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert one.shape == (5, 2)
        assert torch.equal(one, two)
        assert one.dtype == torch.long
        assert base.passes == 0


def test_state_dict_and_repr():
    base = shaken(FactorizedBase(4, 3, [Parity()]))
    other = FactorizedBase(4, 3, [Parity()])
    other.load_state_dict(base.state_dict())
    x = torch.randint(4, (5, 3))
    assert torch.equal(other.log_prob(x), base.log_prob(x))
    assert repr(base) == "FactorizedBase(num_classes=4, length=3, groups=2)"
