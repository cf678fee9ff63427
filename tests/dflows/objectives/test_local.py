"""Local objectives: the plain local loss, and unbiased estimates of it from subsamples."""

import pytest
import torch

from dflows import Context, DiscreteFlow, FactorizedBase, PermutationTransform
from dflows.backbones import LevelConvolution
from dflows.bases import AutoregressiveBase, NGramBase
from dflows.errors import UserError
from dflows.objectives import Local
from dflows.orderings import BehindContext, Blocks, Natural, Parity, Reversed, Strided
from dflows.transforms import Composition
from tests.dflows.objectives.references import local_loss
from tests.dflows.small import (
    BIJECTIONS,
    assert_gradients_close,
    expectation,
    gradients,
    make_conditioner,
    make_flow,
    make_transform,
    prepared,
    shaken,
    states,
)

STACK = [Strided(columns=3), Natural(), Parity(first=1)]


def measured(objective, flow, y, context=None):
    """The value, and the gradients of all parameters, those of the objective too."""
    value = objective(flow, y, context)
    value.sum().backward()
    own = {f"own.{name}": grad for name, grad in gradients(objective).items()}
    return {"value": value.detach()} | gradients(flow) | own


def shared(flow, *subsamples):
    """Objectives with equal targets."""
    return [prepared(Local(subsample), flow) for subsample in subsamples]


class TestAll:
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_the_gradient_is_that_of_the_plain_local_loss(self, bijection, backbone):
        flow = make_flow(4, 5, STACK, bijection, backbone).double()
        objective, y = prepared(Local(), flow), torch.randint(4, (6, 5))
        (-objective(flow, y).mean()).backward()
        actual = gradients(flow), gradients(objective)
        (-local_loss(flow, objective, y).mean()).backward()
        assert_gradients_close(actual[0], gradients(flow))
        assert_gradients_close(actual[1], gradients(objective))

    @pytest.mark.parametrize("where", [0, 1, 3])
    def test_permutations_may_stand_anywhere(self, where):
        flow = make_flow(4, 5, STACK).double()
        stack = list(flow.transforms)
        stack.insert(where, PermutationTransform([2, 0, 3, 1, 4]))
        flow = DiscreteFlow(flow.base, stack)
        objective, y = prepared(Local(), flow), torch.randint(4, (6, 5))
        value = objective(flow, y)
        torch.testing.assert_close(value, flow.log_prob(y))
        value.sum().backward()
        actual = gradients(flow)
        local_loss(flow, objective, y).sum().backward()
        assert_gradients_close(actual, gradients(flow))

    def test_compositions_are_taken_apart(self):
        one, two = make_flow(4, 5, STACK), make_flow(4, 5, STACK)
        parts = list(two.transforms)
        two = DiscreteFlow(two.base, [parts[0], Composition([parts[1], Composition(parts[2:])])])
        y = torch.randint(4, (6, 5))
        results = [measured(prepared(Local(), flow), flow, y) for flow in (one, two)]
        assert_gradients_close(*results)

    def test_a_base_without_a_gradient_will_do(self):
        base = NGramBase(3, 4, order=2)
        base.count([torch.randint(3, (100,))])
        for subsample in ("none", "levels", "transforms"):
            flow = make_flow(3, 4, [Natural(), Parity()], "rank", base=base)
            objective = prepared(Local(subsample), flow)
            objective(flow, torch.randint(3, (20, 4))).sum().backward()
            assert all(parameter.grad is not None for parameter in flow.parameters())


class TestSubsamples:
    @pytest.mark.parametrize("base", ["factorized", "autoregressive"])
    @pytest.mark.parametrize("subsample", ["levels", "transforms"])
    @pytest.mark.parametrize("where", ["none", "front", "middle", "back"])
    def test_they_are_unbiased_in_value_and_gradient(self, monkeypatch, base, subsample, where):
        y = torch.randint(3, (4, 4))
        standing = None
        if base == "autoregressive":
            standing = AutoregressiveBase(make_conditioner(3, 4, Parity(), "masked"))
        flow = make_flow(3, 4, [Strided(columns=3), Parity(first=1)], "affine", base=standing)
        stack = list(flow.transforms)
        if where != "none":
            permutation = PermutationTransform([2, 0, 3, 1])
            stack.insert({"front": 0, "middle": 1, "back": 2}[where], permutation)
        flow = DiscreteFlow(flow.base, stack)
        drawn, whole = shared(flow, subsample, "none")
        mean = expectation(monkeypatch, lambda: measured(drawn, flow, y))
        assert_gradients_close(mean, measured(whole, flow, y), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mean["value"], flow.log_prob(y).detach())

    @pytest.mark.parametrize("subsample", ["levels", "transforms"])
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("stack", [STACK[:1], STACK[:2], STACK[2:]], ids=str)
    def test_they_are_for_every_bijection(self, monkeypatch, subsample, bijection, stack):
        flow = make_flow(3, 4, stack, bijection)
        drawn, whole = shared(flow, subsample, "none")
        y = torch.randint(3, (5, 4))
        mean = expectation(monkeypatch, lambda: measured(drawn, flow, y))
        assert_gradients_close(mean, measured(whole, flow, y), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("subsample", ["levels", "transforms"])
    @pytest.mark.parametrize("aligned", [False, True])
    def test_they_are_given_a_context(self, monkeypatch, subsample, aligned):
        options = {"context": Context(2, aligned=aligned)}
        flow = make_flow(3, 4, [Strided(columns=3), Parity(first=1)], "rank", **options)
        y, context = torch.randint(3, (4, 4)), torch.randn(4, 4, 2)
        drawn, whole = shared(flow, subsample, "none")
        mean = expectation(monkeypatch, lambda: measured(drawn, flow, y, context))
        assert_gradients_close(mean, measured(whole, flow, y, context), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("subsample", ["levels", "transforms"])
    @pytest.mark.parametrize("ordering", [BehindContext(Parity()), BehindContext(Blocks(size=4))])
    def test_they_are_behind_a_context(self, monkeypatch, subsample, ordering):
        flow = make_flow(3, 4, [ordering], "rank", context=Context(2, aligned=True))
        y, context = torch.randint(3, (3, 4)), torch.randn(3, 4, 2)
        (drawn,) = shared(flow, subsample)
        mean = expectation(monkeypatch, lambda: {"value": drawn(flow, y, context).detach()})
        torch.testing.assert_close(mean["value"], flow.log_prob(y, context).detach())

    @pytest.mark.parametrize("subsample", ["levels", "transforms"])
    def test_examples_are_subsampled_by_themselves(self, subsample):
        flow = make_flow(3, 4, [Strided(columns=3), Natural()], "rank")
        objective, y = prepared(Local(subsample), flow), torch.randint(3, (3, 1, 4))
        with torch.no_grad():
            drawn, exact = objective(flow, y.expand(3, 20_000, 4)), flow.log_prob(y)[:, 0]
        error = drawn.std(1) / drawn.shape[1] ** 0.5
        assert ((drawn.mean(1) - exact).abs() < 4 * error).all()
        assert (drawn.std(1) > 0).all()

    def test_a_level_causal_flow_needs_no_sampled_levels(self):
        flow = make_flow(3, 4, STACK[:2], backbone="causal")
        y = torch.randint(3, (5, 4))
        torch.testing.assert_close(prepared(Local("levels"), flow)(flow, y), flow.log_prob(y))

    def test_what_is_sampled_is_right_where_it_weighs(self):
        flow = make_flow(5, 6, [Strided(columns=3)], "rank")
        objective, y = prepared(Local("levels"), flow), torch.randint(5, (200, 6))
        (transform,) = flow.conditional_transforms
        x, zeros, weight = objective.step(transform, 0, y, None, one_level=True, need_all=False)
        used = weight != 0
        assert torch.equal(x[used], transform.inv(y)[used])
        assert (zeros == 0).all()
        levels = transform.ordering.levels(6)
        assert (weight[:, levels == 0] == 1).all()
        assert weight[:, levels > 0].unique().tolist() == [0, 2]
        assert (weight.sum(1) == 2 + 2 * 2).all()
        whole = objective.step(transform, 0, y, None, one_level=True)
        assert torch.equal(whole.x, transform.inv(y))
        assert whole.weight is None

    def test_an_event_of_level_0_alone_is_its_base(self):
        for subsample in ("none", "levels", "transforms"):
            flow = make_flow(5, 6, [Strided(columns=3)], "rank")
            objective, y = prepared(Local(subsample), flow), torch.randint(5, (4, 1))
            torch.testing.assert_close(objective(flow, y), flow.log_prob(y))

    def test_one_transform_twice_in_a_stack_is_two(self):
        single = make_flow(3, 4, [Natural()], "rank", sharing="levels")
        (transform,) = single.conditional_transforms
        stack = [transform, PermutationTransform([3, 2, 1, 0]), transform]
        flow = shaken(DiscreteFlow(FactorizedBase(3, 4), stack))
        objective, y = prepared(Local("transforms"), flow), torch.randint(3, (3, 1, 4))
        with torch.no_grad():
            drawn, exact = objective(flow, y.expand(3, 20_000, 4)), flow.log_prob(y)[:, 0]
        error = drawn.std(1) / drawn.shape[1] ** 0.5
        assert ((drawn.mean(1) - exact).abs() < 4 * error + 1e-5).all()

    @pytest.mark.parametrize("seed", range(6))
    def test_a_transform_that_no_example_chose_gets_a_gradient_of_zero(self, seed):
        # Of one example one transform alone is trained, and distributed training waits for all.
        torch.manual_seed(seed)
        transforms = [
            make_transform(3, 4, ordering, "rank", LevelConvolution(8))
            for ordering in (Parity(), Parity(first=1))
        ]
        flow = DiscreteFlow(FactorizedBase(3, 4), transforms)
        objective = Local("transforms")
        objective.prepare(flow)
        objective(flow, torch.zeros(1, 4, dtype=torch.long)).sum().backward()
        trained = [transform.conditioner.head.bias.grad.any() for transform in transforms]
        assert sum(trained) == 1
        assert all(parameter.grad is not None for parameter in flow.parameters())


class TestTargets:
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    def test_only_a_bijection_that_needs_one_has_a_target(self, bijection):
        flow, objective = make_flow(5, 4, [Parity(), Natural()], bijection), Local()
        objective.prepare(flow)
        needed = bijection in ("affine", "affine-prime")
        assert list(objective.targets) == (["0", "1"] if needed else [])
        for target in objective.targets.values():
            torch.testing.assert_close(target.softmax(-1), torch.tensor([5, 1, 1, 1, 1]) / 9)

    def test_the_flow_knows_nothing_of_them(self):
        flow = make_flow(5, 4)
        before = set(flow.state_dict())
        Local().prepare(flow)
        assert set(flow.state_dict()) == before


def test_what_has_no_loss_of_its_own_is_refused():
    (transform,) = make_flow(3, 4, [Natural()]).transforms
    with pytest.raises(UserError, match=r"Inverse in the stack has parameters.*EndToEnd"):
        Local().prepare(DiscreteFlow(FactorizedBase(3, 4), [transform.inv]))
    Local().prepare(DiscreteFlow(FactorizedBase(3, 4), [PermutationTransform([1, 0, 3, 2])]))


@pytest.mark.parametrize("subsample", ["none", "levels", "transforms"])
def test_it_is_to_be_prepared(subsample):
    flow, y = make_flow(3, 4, [Natural()], "affine"), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(UserError, match=r"no target for a ModularAffine: call objective\.prepare"):
        Local(subsample)(flow, y)


def test_the_subsample_is_one_of_three():
    assert "subsample='levels'" in repr(Local("levels"))
    with pytest.raises(UserError, match="give 'none', 'levels', 'transforms'"):
        Local("level")


@pytest.mark.parametrize("subsample", ["none", "levels", "transforms"])
def test_transforms_may_share_a_backbone(subsample, monkeypatch):
    backbone = LevelConvolution(8)
    transforms = [
        make_transform(3, 4, ordering, "rank", backbone) for ordering in (Natural(), Reversed())
    ]
    flow = shaken(DiscreteFlow(FactorizedBase(3, 4), transforms))
    drawn, whole = shared(flow, subsample, "none")
    y = states(3, 4)[::20]
    mean = expectation(monkeypatch, lambda: measured(drawn, flow, y))
    assert_gradients_close(mean, measured(whole, flow, y), rtol=1e-4, atol=1e-5)
