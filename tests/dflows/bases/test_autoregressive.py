import pytest
import torch

from dflows.backbones import Table
from dflows.bases import AutoregressiveBase
from dflows.conditioner import Conditioner, Context
from dflows.errors import NonFiniteError, UserError
from dflows.orderings import BehindContext, Natural, Strided
from dflows.representations import to_one_hot
from tests.dflows.small import (
    BACKBONES,
    ORDERINGS,
    WIDTH,
    assert_gradients_close,
    expectation,
    gradients,
    make_conditioner,
    shaken,
    states,
)


def make(num_classes=3, length=4, ordering=None, backbone="causal", **options):
    torch.manual_seed(0)
    ordering = ordering or Natural()
    conditioner = make_conditioner(num_classes, length, ordering, backbone, **options)
    return shaken(AutoregressiveBase(conditioner))


@pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_probabilities_sum_to_1(ordering, backbone, length):
    base, x = make(ordering=ordering, backbone=backbone), states(3, length)
    log_prob = base.log_prob(x)
    assert log_prob.shape == (3**length, length)
    torch.testing.assert_close(log_prob.sum(-1).exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(base.log_prob(to_one_hot(x, 3)), log_prob)
    assert base.passes == int(ordering.levels(4).max()) + 1


class TestConstruction:
    def test_the_logits_must_be_those_of_the_classes(self):
        with pytest.raises(UserError, match="logits of 3 classes, and the conditioner has 4"):
            AutoregressiveBase(make_conditioner(3, 4, Natural(), num_logits=4))

    def test_it_begins_at_level_0(self):
        with pytest.raises(UserError, match="no dimension of level 0, where a base starts"):
            AutoregressiveBase(make_conditioner(3, 4, BehindContext(Natural()), context=Context(2)))

    def test_it_is_of_the_conditioner_that_it_was_given(self):
        conditioner = make_conditioner(3, 4, Strided(columns=2))
        base = AutoregressiveBase(conditioner)
        assert base.conditioner is conditioner
        assert (base.num_classes, base.length, base.ordering) == (3, 4, Strided(columns=2))
        assert not base.takes_context
        assert make(context=Context(2)).takes_context


class TestSample:
    @pytest.mark.parametrize("ordering", [Natural(), Strided(columns=2)], ids=str)
    @pytest.mark.parametrize("backbone", BACKBONES)
    def test_levels_and_fixed_point_give_the_same(self, ordering, backbone):
        base = make(5, 6, ordering, backbone)
        with torch.no_grad():
            one, two = (
                base.sample(
                    50,
                    5,
                    generator=torch.Generator().manual_seed(1),
                    fixed_point=fixed_point,
                    temperature=0.8,
                )
                for fixed_point in (False, True)
            )
        assert torch.equal(one, two)
        assert one.shape == (50, 5)

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_frequencies_are_the_probabilities(self, temperature):
        base, x = make(3, 3), states(3, 3)
        with torch.no_grad():
            samples = base.sample(30_000, 3, temperature=temperature)
            log_probs = (base.conditioner(x) / temperature).log_softmax(-1)
        probs = log_probs.gather(-1, x.unsqueeze(-1)).sum((-1, -2)).exp()
        cells = (samples * torch.tensor([9, 3, 1])).sum(-1)
        frequency = cells.bincount(minlength=27) / len(samples)
        torch.testing.assert_close(frequency, probs, rtol=0, atol=0.012)


class TestTraining:
    @pytest.mark.parametrize("backbone", BACKBONES)
    def test_every_parameter_receives_a_gradient(self, backbone):
        base = make(backbone=backbone)
        base.log_prob(torch.randint(3, (20, 4))).sum().backward()
        for name, parameter in base.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name

    @pytest.mark.parametrize("weighted", [False, True])
    def test_sampled_levels_are_unbiased(self, monkeypatch, weighted):
        ordering, x = Strided(columns=3), torch.randint(3, (5, 4))
        weight = torch.rand(5, 4) if weighted else None
        results = []
        base = make(ordering=ordering, backbone="masked")
        plain = torch.ones(()) if weight is None else weight
        for function in (
            lambda: base.sampled_log_prob(x, None, weight),
            lambda: (base.log_prob(x) * plain).sum(-1),
        ):

            def run(function=function):
                value = function()
                value.sum().backward()
                return {"value": value.detach()} | gradients(base)

            results.append(expectation(monkeypatch, run))
        assert_gradients_close(*results, rtol=1e-4, atol=1e-5)

    def test_it_starts_at_the_marginal(self):
        base = AutoregressiveBase(make_conditioner(3, 4, Natural(), "causal"))
        base.init_from_counts(torch.tensor([0, 1, 6]))
        x = torch.randint(3, (20, 4))
        torch.testing.assert_close(base.log_prob(x), torch.tensor([0.1, 0.2, 0.7])[x].log())
        base.init_from_counts(torch.tensor([[0, 0, 2], [0, 1, 4]]))
        torch.testing.assert_close(base.log_prob(x), torch.tensor([0.1, 0.2, 0.7])[x].log())

    def test_a_table_learns_any_distribution(self):
        table = Table(WIDTH, 2, 3, Natural())
        base = AutoregressiveBase(Conditioner(2, 3, Natural(), table))
        target = torch.tensor([0.4, 0.05, 0.05, 0.1, 0.2, 0.1, 0.05, 0.05])
        optimizer = torch.optim.Adam(base.parameters(), 0.05)
        for _ in range(300):
            loss = -(target * base.log_prob(states(2, 3)).sum(-1)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        entropy = -(target * target.log()).sum()
        torch.testing.assert_close(loss.detach(), entropy, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(6, 2), (6, 3, 2)])
@pytest.mark.parametrize("backbone", ["causal", "masked"])
def test_a_context_is_conditioned_on(shape, backbone):
    base = make(backbone=backbone, context=Context(2))
    context, x = torch.randn(shape), torch.randint(3, (6, 4))
    log_prob = base.log_prob(x, context)
    assert not torch.allclose(log_prob, base.log_prob(x, -context))
    every = states(3, 4)
    one = context[:1].expand(len(every), *shape[1:])
    torch.testing.assert_close(base.log_prob(every, one).sum(-1).exp().sum(), torch.tensor(1.0))
    with torch.no_grad():
        assert base.sample(6, 4, context).shape == (6, 4)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_network_is_an_error_everywhere(backbone, value):
    base, x = make(backbone=backbone), torch.randint(3, (5, 4))
    base.conditioner.head.bias.data[1] = value
    calls = (
        lambda: base.log_prob(x),
        lambda: base.log_prob(to_one_hot(x, 3)),
        lambda: base.sampled_log_prob(x),
        lambda: base.sample(5, 4),
        lambda: base.sample(5, 4, fixed_point=True),
        lambda: base.greedy(5, 4),
    )
    for training in (False, True):
        base.train(training)
        for call in calls:
            for mode in (torch.no_grad, torch.enable_grad):
                with mode(), pytest.raises(NonFiniteError, match="AutoregressiveBase"):
                    call()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_class_of_probability_0_is_finite_elsewhere_and_never_drawn(backbone):
    base, x = make(backbone=backbone), states(3, 4)
    base.conditioner.head.bias.data[2] = -torch.inf
    log_prob = base.log_prob(x)
    assert torch.equal(log_prob.isinf(), x == 2)
    vectors = to_one_hot(x, 3)
    torch.testing.assert_close(base.log_prob(vectors), log_prob)
    torch.testing.assert_close(log_prob.sum(-1).exp().sum(), torch.tensor(1.0))
    with torch.no_grad():
        assert base.sample(1000, 4).max() == 1
        assert base.greedy(1, 4).max() <= 1


@pytest.mark.parametrize("backbone", ["masked", "causal-convolution"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_a_full_distribution(backbone, dtype):
    base = make(256, 3, backbone=backbone)
    base.conditioner.head.weight.data.mul_(0.1)
    base = base.to(dtype)
    x = torch.cat([torch.zeros(256, 2, dtype=torch.long), torch.arange(256).unsqueeze(-1)], 1)
    with torch.no_grad():
        log_prob = base.log_prob(x)
        logits = base.conditioner(x)
        samples = base.sample(20_000, 1)
    assert log_prob.dtype == torch.float32
    expected = logits.double().log_softmax(-1).gather(-1, x.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_prob[:, 2].exp().sum(), torch.tensor(1.0), rtol=1e-4, atol=0)
    probs = base.conditioner(x[:1, :1])[0, 0].double().softmax(-1).detach()
    counts = samples[:, 0].bincount(minlength=256).double()
    likely = probs * 20_000 > 8
    assert (counts[likely] > 0).all()
    deviations = (counts - probs * 20_000).abs() / (probs * 20_000).sqrt().clamp(min=1)
    assert deviations.max() < 5
    torch.set_default_dtype(dtype)  # as Lightning's true half precision does
    try:
        assert base.noise(1, 1).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
