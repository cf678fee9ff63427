import pytest
import torch

from dflows.backbones import Table
from dflows.bases import AutoregressiveBase
from dflows.errors import UserError
from dflows.orderings import Natural, Strided
from dflows.representations import to_one_hot
from tests.dflows.small import (
    BACKBONES,
    ORDERINGS,
    WIDTH,
    assert_gradients_close,
    expectation,
    gradients,
    shaken,
    states,
)


def make(num_classes=3, length=4, ordering=None, backbone="causal", **options):
    torch.manual_seed(0)
    network = BACKBONES[backbone]() if isinstance(backbone, str) else backbone
    return shaken(
        AutoregressiveBase(num_classes, length, backbone=network, ordering=ordering, **options)
    )


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


def test_the_ordering_is_natural_by_default():
    assert make().conditioner.ordering == Natural()


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
        base.objective(torch.randint(3, (20, 4))).sum().backward()
        for name, parameter in base.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name

    @pytest.mark.parametrize("weighted", [False, True])
    def test_drawn_levels_are_unbiased(self, monkeypatch, weighted):
        ordering, x = Strided(columns=3), torch.randint(3, (5, 4))
        weight = torch.rand(5, 4) if weighted else None
        results = []
        for draw in ("level", "all"):
            base = make(ordering=ordering, backbone="masked", draw=draw)

            def run(base=base):
                objective = base.objective(x, None, weight)
                objective.sum().backward()
                return {"value": objective.detach()} | gradients(base)

            results.append(expectation(monkeypatch, run))
        assert_gradients_close(*results, rtol=1e-4, atol=1e-5)

    def test_it_starts_at_the_marginal(self):
        base = AutoregressiveBase(3, 4, backbone=BACKBONES["causal"]())
        base.start(torch.tensor([0, 1, 6]))
        x = torch.randint(3, (20, 4))
        torch.testing.assert_close(base.log_prob(x), torch.tensor([0.1, 0.2, 0.7])[x].log())
        base.start(torch.tensor([[0, 0, 2], [0, 1, 4]]))
        torch.testing.assert_close(base.log_prob(x), torch.tensor([0.1, 0.2, 0.7])[x].log())

    def test_a_table_learns_any_distribution(self):
        table = Table(WIDTH, 2, 3, Natural())
        base = AutoregressiveBase(2, 3, backbone=table)
        target = torch.tensor([0.4, 0.05, 0.05, 0.1, 0.2, 0.1, 0.05, 0.05])
        optimizer = torch.optim.Adam(base.parameters(), 0.05)
        for _ in range(300):
            loss = -(target * base.objective(states(2, 3))).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        entropy = -(target * target.log()).sum()
        torch.testing.assert_close(loss.detach(), entropy, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(6, 2), (6, 3, 2)])
@pytest.mark.parametrize("backbone", ["causal", "masked"])
def test_a_context_is_conditioned_on(shape, backbone):
    base = make(backbone=backbone, context_features=2)
    context, x = torch.randn(shape), torch.randint(3, (6, 4))
    log_prob = base.log_prob(x, context)
    assert not torch.allclose(log_prob, base.log_prob(x, -context))
    every = states(3, 4)
    one = context[:1].expand(len(every), *shape[1:])
    torch.testing.assert_close(base.log_prob(every, one).sum(-1).exp().sum(), torch.tensor(1.0))
    with torch.no_grad():
        assert base.sample(6, 4, context).shape == (6, 4)


def test_what_it_draws_is_one_of_two():
    with pytest.raises(UserError, match="'all' or 'level'"):
        make(draw="flow")
