import pytest
import torch

from dflows import DiscreteFlow
from dflows.bases import FactorizedBase
from dflows.errors import NonFiniteError, UserError
from dflows.orderings import Natural, Parity, Strided
from dflows.representations import to_one_hot
from tests.dflows.small import shaken, states


def under(orderings, num_classes=3, length=4, sharing="levels"):
    """A base that adapts to orderings, as in a flow."""
    base = FactorizedBase(num_classes, length, sharing)
    base.adapt(orderings)
    return base


@pytest.mark.parametrize("sharing", ["levels", "positions"])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_it_is_the_product_of_its_dimensions(sharing, length):
    base = shaken(under([Parity()], 3, 4, sharing))
    x = states(3, length)
    log_prob = base.log_prob(x)
    probs = base.logits.softmax(-1)
    for d in range(length):
        expected = probs[base.groups[d]][x[:, d]]
        torch.testing.assert_close(log_prob[:, d].exp(), expected)
    torch.testing.assert_close(log_prob.sum(-1).exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(base.log_prob(to_one_hot(x, 3)), log_prob)
    torch.testing.assert_close(base.sampled_log_prob(x), log_prob.sum(-1))
    weight = torch.rand(x.shape)
    torch.testing.assert_close(base.sampled_log_prob(x, None, weight), (weight * log_prob).sum(-1))


@pytest.mark.parametrize(
    ("orderings", "groups"),
    [
        ([], [0, 0, 0, 0, 0]),
        ([Strided(columns=2)], [0, 1, 0, 1, 0]),
        ([Strided(columns=3), Parity()], [0, 3, 4, 1, 2]),
        ([Natural()], [0, 1, 2, 3, 4]),
    ],
)
def test_dimensions_that_transforms_treat_alike_share(orderings, groups):
    base = under(orderings, 3, 5)
    assert base.groups.tolist() == groups
    assert base.logits.shape == (max(groups) + 1, 3)
    assert under(orderings, 3, 5, "positions").groups.tolist() == [0, 1, 2, 3, 4]


def test_sharing_is_one_of_two():
    with pytest.raises(UserError, match="'levels' or 'positions'"):
        FactorizedBase(3, 5, sharing="none")


class TestInitFromCounts:
    @pytest.mark.parametrize("sharing", ["levels", "positions"])
    def test_transformed_dimensions_start_peaked_and_others_at_the_marginal(self, sharing):
        base = under([Parity()], 4, 5, sharing)
        base.init_from_counts(torch.tensor([9, 19, 29, 39]))
        for d in range(5):
            probs = base.logits.softmax(-1)[base.groups[d]]
            expected = [0.1, 0.2, 0.3, 0.4] if d % 2 == 0 else [1 / 2, 1 / 6, 1 / 6, 1 / 6]
            torch.testing.assert_close(probs, torch.tensor(expected))

    def test_without_transforms_all_start_at_the_marginal(self):
        base = FactorizedBase(3, 5)
        base.init_from_counts(torch.tensor([0, 1, 6]))
        torch.testing.assert_close(base.logits.softmax(-1), torch.tensor([[0.1, 0.2, 0.7]]))

    def test_counts_may_be_those_of_every_dimension(self):
        counts = torch.tensor([[8, 0], [3, 5], [0, 8]])
        base = FactorizedBase(2, 3, sharing="positions")
        base.init_from_counts(counts)
        torch.testing.assert_close(
            base.logits.softmax(-1), torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9]])
        )
        base = FactorizedBase(2, 3)
        base.init_from_counts(counts)  # one group: the mean of its dimensions
        torch.testing.assert_close(base.logits.softmax(-1), torch.tensor([[1.4, 1.6]]) / 3)


class TestRefit:
    @pytest.mark.parametrize("sharing", ["levels", "positions"])
    def test_it_is_the_most_likely_distribution(self, sharing):
        base = shaken(under([Parity()], 3, 4, sharing))
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
        base = under([Parity()], 3, 4)
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
        base = shaken(under([Parity()], 3, 4))
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


class TestAdapt:
    def test_it_adapts_once(self):
        base = shaken(under([Parity()]))
        logits = base.logits
        base.adapt((Parity(),))
        assert base.logits is logits
        for other in ([], [Natural()], [Parity(), Parity()]):
            with pytest.raises(UserError, match=r"of a flow over \[Parity.*create one for each"):
                base.adapt(other)
        assert base.logits is logits

    def test_its_type_is_kept(self):
        base = FactorizedBase(3, 4).double()
        base.adapt([Natural()])
        assert base.logits.dtype == torch.float64
        assert base.groups.dtype == torch.long
        assert base.logits.shape == (4, 3)

    def test_by_itself_none_of_its_dimensions_is_transformed(self):
        assert not FactorizedBase(3, 4).peaked.any()
        assert under([Natural()]).peaked.tolist() == [False, True, True, True]


class TestFinite:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_what_has_diverged_is_an_error_everywhere(self, value):
        base = FactorizedBase(3, 4)
        base.logits.data[0, 1] = value
        x = torch.randint(3, (5, 4))
        calls = (
            lambda: base.log_prob(x),
            lambda: base.log_prob(to_one_hot(x, 3)),
            lambda: base.sampled_log_prob(x),
            lambda: base.sample(5, 4),
            lambda: base.greedy(5, 4),
        )
        for training in (False, True):
            base.train(training)
            for call in calls:
                with pytest.raises(NonFiniteError, match="FactorizedBase"):
                    call()

    def test_a_class_of_probability_0_adds_nothing_where_it_is_not(self):
        base = FactorizedBase(3, 2, "positions")
        base.logits.data[1, 2] = -torch.inf
        x = states(3, 2)
        log_prob = base.log_prob(x)
        vectors = base.log_prob(to_one_hot(x, 3))
        assert torch.equal(vectors, log_prob)
        assert torch.equal(log_prob[:, 1].isinf(), x[:, 1] == 2)
        assert not log_prob.isnan().any()
        torch.testing.assert_close(log_prob.sum(-1).exp().sum(), torch.tensor(1.0))
        one_hot = to_one_hot(x[x[:, 1] < 2], 3).requires_grad_()
        base.log_prob(one_hot).sum().backward()
        assert one_hot.grad.isfinite().all()
        assert base.logits.grad.isfinite().all()
        assert (base.greedy(1, 2)[:, 1] != 2).all()


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_likelihood_and_samples_are_those_of_the_weights_in_full(self, dtype):
        base = shaken(FactorizedBase(256, 4, "positions")).to(dtype)
        full = FactorizedBase(256, 4, "positions")
        full.load_state_dict(base.state_dict())
        x = torch.randint(256, (50, 4))
        assert base.log_prob(x).dtype == torch.float32
        assert torch.equal(base.log_prob(x), full.log_prob(x))
        torch.testing.assert_close(base.log_prob(to_one_hot(x, 256, dtype)), full.log_prob(x))
        samples = base.sample(20_000, 1)
        assert len(samples.unique()) > 250
        again = full.sample(500, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(base.sample(500, 4, generator=torch.Generator().manual_seed(0)), again)


def test_state_dict_and_repr():
    base = shaken(under([Parity()], 4, 3))
    other = under([Parity()], 4, 3)
    other.load_state_dict(base.state_dict())
    x = torch.randint(4, (5, 3))
    assert torch.equal(other.log_prob(x), base.log_prob(x))
    assert repr(base) == "FactorizedBase(num_classes=4, length=3, groups=2)"


def test_a_base_that_stands_alone_under_a_flow_serves_no_other_orderings():
    base = FactorizedBase(3, 4)
    DiscreteFlow(base)
    with pytest.raises(UserError, match="create one for each flow"):
        base.adapt([Natural()])
