import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflows.backbones import LSTM, MADE, DilatedConvolution, Table, Transformer
from dflows.bijections import ModularAffine, RankPermutation
from dflows.errors import UserError
from dflows.estimators import PosteriorRule
from dflows.orderings import Natural, Parity, Reversed, Strided
from dflows.representations import to_one_hot
from dflows.transforms import (
    AutoregressiveTransform,
    BipartiteTransform,
    Composition,
    ConditionalTransform,
    Inverse,
)
from tests.dflows.small import (
    BIJECTIONS,
    ESTIMATORS,
    ORDERINGS,
    WIDTH,
    make_transform,
    shaken,
    skip_refused,
    states,
)


def assert_bijection_of_all_states(transform, num_classes, length):
    x = states(num_classes, length)
    with torch.no_grad():
        y = transform(x)
        assert len(y.unique(dim=0)) == len(x)
        assert torch.equal(transform.inv(y), x)
        assert torch.equal(transform(transform.inv(x)), x)


@pytest.mark.parametrize("bijection", BIJECTIONS)
@pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
@pytest.mark.parametrize("backbone", ["causal", "causal-convolution", "masked"])
@pytest.mark.parametrize(("num_classes", "length"), [(2, 5), (3, 4), (4, 3)])
def test_all_states_are_met_once(bijection, ordering, backbone, num_classes, length):
    transform = make_transform(num_classes, length, ordering, bijection, backbone=backbone)
    x = states(num_classes, length)
    shaken(transform)
    if num_classes > 2:  # where a map is the identity by chance, but not every one
        assert any(not torch.equal(shaken(transform, seed)(x), x) for seed in range(4))
    assert_bijection_of_all_states(transform, num_classes, length)


@pytest.mark.parametrize("name", ["made", "lstm", "table", "bidirectional"])
def test_any_backbone_gives_a_bijection(name):
    backbone = {
        "made": lambda: MADE(WIDTH, length=4, hidden=16),
        "lstm": lambda: LSTM(WIDTH),
        "table": lambda: Table(WIDTH, 3, 4, Reversed()),
        "bidirectional": lambda: LSTM(WIDTH, bidirectional=True),
    }[name]()
    transform = shaken(ConditionalTransform(4, ModularAffine(3), Reversed(), backbone))
    assert_bijection_of_all_states(transform, 3, 4)


@given(
    num_classes=st.integers(2, 12),
    length=st.integers(2, 9),
    ordering=st.sampled_from([o for name, o in ORDERINGS.items() if name != "permutation"]),
    bijection=st.sampled_from(sorted(BIJECTIONS)),
    backbone=st.sampled_from(["causal", "masked"]),
    data=st.data(),
)
def test_values_come_back(num_classes, length, ordering, bijection, backbone, data):
    if int(ordering.levels(length).max()) == 0:
        return
    transform = shaken(make_transform(num_classes, length, ordering, bijection, backbone=backbone))
    event = data.draw(st.integers(1, length))
    x = torch.randint(num_classes, (3, event))
    with torch.no_grad():
        y = transform(x)
        assert torch.equal(transform.inv(y), x)
        assert torch.equal(transform(transform.inv(x)), x)
    level_0 = ordering.levels(event) == 0
    assert torch.equal(y[:, level_0], x[:, level_0])


class TestValues:
    @pytest.mark.parametrize("estimator", ["straight-through", "local"])
    @pytest.mark.parametrize("bijection", ["affine-prime", "rank"])
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    @pytest.mark.parametrize("grad", [False, True])
    def test_one_hot_vectors_and_indices_agree(self, estimator, bijection, backbone, grad):
        transform = shaken(make_transform(4, 5, Strided(columns=3), bijection, estimator, backbone))
        x = torch.randint(4, (2, 3, 5))
        one_hot = to_one_hot(x, 4)
        with torch.set_grad_enabled(grad):
            for function in (transform.call_and_ladj, transform.inverse_and_ladj):
                expected, zeros = function(x)
                result, more_zeros = function(one_hot)
                assert torch.equal(result, to_one_hot(expected, 4))
                assert zeros.shape == more_zeros.shape == (2, 3)
                assert not zeros.any()
                assert not more_zeros.any()

    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3), (0,)])
    def test_batch_dimensions_are_kept(self, shape):
        transform = shaken(make_transform(4, 5, Parity()))
        x = torch.randint(4, (*shape, 5))
        y = transform(x)
        assert y.shape == x.shape
        assert torch.equal(transform.inv(y), x)
        assert transform.log_abs_det_jacobian(x, y).shape == shape
        for row, mapped in zip(x.reshape(-1, 5), y.reshape(-1, 5), strict=True):
            assert torch.equal(transform(row), mapped)

    @pytest.mark.parametrize("bijection", BIJECTIONS)
    def test_values_stay_exactly_one_hot_over_64_flows(self, bijection):
        stack = Composition(
            [
                make_transform(5, 4, Parity(first=n % 2), bijection, "straight-through")
                for n in range(64)
            ]
        )
        shaken(stack, scale=0.3)
        y = torch.randint(5, (6, 4))
        x = stack.inv(to_one_hot(y, 5))
        assert x.requires_grad
        assert torch.equal(x.sort(dim=-1).values, to_one_hot(torch.full_like(y, 4), 5))
        with torch.no_grad():
            assert torch.equal(x.argmax(-1), stack.inv(y))
            assert torch.equal(stack(x), to_one_hot(y, 5))

    @pytest.mark.parametrize("bijection", BIJECTIONS)
    def test_it_starts_as_the_identity(self, bijection):
        transform = make_transform(6, 5, Natural(), bijection, backbone="causal")
        x = torch.randint(6, (20, 5))
        assert torch.equal(transform(x), x)
        assert torch.equal(transform.inv(x), x)

    @pytest.mark.parametrize("bijection", BIJECTIONS)
    def test_tied_logits_are_no_trouble(self, bijection):
        transform = make_transform(3, 4, Natural(), bijection, backbone="causal")
        torch.nn.init.zeros_(transform.conditioner.head.bias)
        assert_bijection_of_all_states(transform, 3, 4)

    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_float64_and_autocast(self, bijection, backbone):
        transform = shaken(make_transform(5, 4, Parity(), bijection, "straight-through", backbone))
        x = torch.randint(5, (50, 4))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(transform.inv(transform(x)), x)
            one_hot = transform.inv(to_one_hot(x, 5))
            assert torch.equal(one_hot, one_hot.round())
            one_hot.square().sum().backward()
        transform = transform.double()
        assert torch.equal(transform.inv(transform(x)), x)
        one_hot = to_one_hot(x, 5, torch.float64)
        assert transform.inv(one_hot).dtype == torch.float64
        assert torch.equal(transform.inv(transform(one_hot)), one_hot)


class TestContext:
    @pytest.mark.parametrize("shape", [(3, 2), (3, 4, 2)])
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_it_chooses_the_map(self, shape, backbone):
        transform = shaken(make_transform(6, 4, Natural(), backbone=backbone, context_features=2))
        context = torch.randn(shape)
        x = torch.randint(6, (10, 1, 4)).expand(10, 3, 4)
        y = transform(x, context)
        assert torch.equal(transform.inverse(y, context), x)
        assert not torch.equal(y[:, 0], y[:, 1])
        for example in range(3):
            alone = transform(x[:, example : example + 1], context[example : example + 1])
            assert torch.equal(alone, y[:, example : example + 1])


class TestFixedPoint:
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_it_gives_what_the_levels_give(self, bijection, ordering, backbone):
        transform = shaken(make_transform(5, 5, ordering, bijection, backbone=backbone))
        x = torch.randint(5, (4, 3, 5))
        with torch.no_grad():
            y, iterations = transform.fixed_point(x)
            assert torch.equal(y, transform(x))
        assert iterations <= transform.passes + 1

    def test_the_identity_is_found_at_once(self):
        transform = make_transform(5, 5, Natural(), backbone="causal")
        x = torch.randint(5, (4, 5))
        with torch.no_grad():
            assert transform.fixed_point(x)[1] == 1


class TestTraining:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("backbone", ["causal", "causal-convolution", "masked"])
    def test_every_parameter_receives_a_gradient(self, estimator, bijection, backbone):
        skip_refused(estimator, bijection)
        transform = shaken(make_transform(5, 6, Strided(columns=3), bijection, estimator, backbone))
        y = torch.randint(5, (30, 6))
        if transform.estimator.through:
            x, ladj = transform.inverse_and_ladj(to_one_hot(y, 5))
            loss = (x * torch.randn(5)).sum() + ladj.sum()
        else:
            loss = transform.inverse_and_ladj(y)[1].sum()
        loss.backward()
        for name, parameter in transform.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name

    def test_a_gradient_reaches_the_value_through_every_way(self):
        # Base → data with one-hot vectors: by the value itself, and by what it conditions.
        transform = shaken(make_transform(5, 4, Natural(), "affine", "posterior", "causal"))
        x = to_one_hot(torch.randint(5, (6, 4)), 5).requires_grad_()
        y, ladj = transform.call_and_ladj(x)
        ((y[:, -1] * torch.randn(5)).sum() + ladj.sum()).backward()
        assert x.grad.any(-1).all()

    def test_estimator_and_bijection_must_fit(self):
        with pytest.raises(UserError, match="PosteriorRule"):
            make_transform(5, 4, Parity(), "rank", "posterior")

    def test_only_a_local_objective_that_needs_one_has_a_target(self):
        assert make_transform(5, 4, Parity(), "affine", "local").target is not None
        assert make_transform(5, 4, Parity(), "affine", "posterior").target is None
        assert make_transform(5, 4, Parity(), "rank", "local").target is None
        target = make_transform(5, 4, Parity(), "affine", "local").target.softmax(-1)
        torch.testing.assert_close(target, torch.tensor([5 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9]))


class TestDraw:
    def test_what_is_drawn_is_right_where_it_weighs(self):
        transform = shaken(make_transform(5, 6, Strided(columns=3), "rank", "one-level"))
        y = torch.randint(5, (200, 6))
        drawn = transform.draw(y)
        x = transform.inv(y)
        used = drawn.weight != 0
        assert torch.equal(drawn.x[used], x[used])
        assert (drawn.ladj == 0).all()
        levels = transform.ordering.levels(6)
        assert (drawn.weight[:, levels == 0] == 1).all()
        assert drawn.weight[:, levels > 0].unique().tolist() == [0, 2]
        assert (drawn.weight.sum(1) == 2 + 2 * 2).all()

    def test_an_event_of_level_0_alone_draws_nothing(self):
        transform = make_transform(5, 6, Strided(columns=3), "rank", "one-level")
        y = torch.randint(5, (4, 1))
        drawn = transform.draw(y)
        assert torch.equal(drawn.x, y)
        assert (drawn.weight == 1).all()


class TestObject:
    def test_state_dict_pickle_and_copies_round_trip(self):
        transform = shaken(make_transform(5, 4, Natural(), backbone="causal"))
        other = shaken(make_transform(5, 4, Natural(), backbone="causal"), seed=1)
        x = torch.randint(5, (20, 4))
        y = transform(x)
        assert not torch.equal(other(x), y)
        other.load_state_dict(transform.state_dict())
        for same in (other, copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
            assert torch.equal(same(x), y)
            assert torch.equal(same.inv(y), x)

    def test_repr_shows_the_five_choices(self):
        shown = repr(make_transform(5, 4, Strided(columns=2), "rank", "local"))
        for part in (
            "RankPermutation(num_classes=5)",
            "LocalObjective(draw='all')",
            "Strided(columns=2)",
            "DilatedConvolution(",
        ):
            assert part in shown

    def test_the_inverse_shares_parameters_and_is_its_own_inverse(self):
        transform = shaken(make_transform(5, 4, Natural()))
        inverse = transform.inv
        assert isinstance(inverse, Inverse)
        assert inverse.inv is transform
        assert {id(p) for p in inverse.parameters()} == {id(p) for p in transform.parameters()}
        x = torch.randint(5, (20, 4))
        assert torch.equal(inverse(transform(x)), x)
        assert torch.equal(inverse.inverse(x), transform(x))
        assert (transform.passes, inverse.passes) == (3, 1)


class TestNames:
    def backbone(self):
        return Transformer(WIDTH, layers=1, heads=2)

    def test_autoregressive_has_a_level_for_every_dimension(self):
        transform = AutoregressiveTransform(5, RankPermutation(3), self.backbone())
        assert transform.ordering == Natural()
        assert transform.passes == 4
        transform = AutoregressiveTransform(
            5, RankPermutation(3), self.backbone(), ordering=Reversed(), execution="masked"
        )
        assert not transform.conditioner.one_pass
        with pytest.raises(UserError, match="gives 5 dimensions fewer levels"):
            AutoregressiveTransform(5, RankPermutation(3), self.backbone(), ordering=Parity())

    def test_bipartite_has_two_levels(self):
        transform = BipartiteTransform(
            5, ModularAffine(3), DilatedConvolution(WIDTH), PosteriorRule()
        )
        assert transform.ordering == Parity()
        assert transform.passes == 1
        with pytest.raises(UserError, match="has 5 levels over 5 dimensions"):
            BipartiteTransform(5, ModularAffine(3), self.backbone(), ordering=Natural())

    @pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
    def test_a_single_dimension_is_nothing_to_transform(self, ordering):
        for make in (
            lambda: ConditionalTransform(1, RankPermutation(3), ordering, self.backbone()),
            lambda: BipartiteTransform(1, RankPermutation(3), self.backbone(), ordering=ordering),
            lambda: AutoregressiveTransform(
                1, RankPermutation(3), self.backbone(), ordering=ordering
            ),
        ):
            with pytest.raises(UserError, match=r"level|levels"):
                make()

    @pytest.mark.parametrize("length", [2, 3, 7])
    @pytest.mark.parametrize("ordering", [Parity(), Parity(first=1)], ids=str)
    def test_the_parts_may_be_unequal(self, length, ordering):
        transform = shaken(
            BipartiteTransform(length, ModularAffine(2), self.backbone(), ordering=ordering)
        )
        assert_bijection_of_all_states(transform, 2, length)
