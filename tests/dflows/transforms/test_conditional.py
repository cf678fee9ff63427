import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflows.backbones import LSTM, MADE, Table
from dflows.bijections import ModularAffine, RankPermutation
from dflows.conditioner import Conditioner, Context
from dflows.errors import NonFiniteError, UserError
from dflows.orderings import BehindContext, Natural, Parity, Reversed, Strided
from dflows.representations import to_one_hot
from dflows.transforms import Composition, ConditionalTransform, Inverse
from tests.dflows.small import (
    BIJECTIONS,
    ORDERINGS,
    RULES,
    WIDTH,
    make_conditioner,
    make_transform,
    shaken,
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
    transform = shaken(make_transform(3, 4, Reversed(), ModularAffine(3), backbone))
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
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    @pytest.mark.parametrize("grad", [False, True])
    def test_one_hot_vectors_and_indices_agree(self, rule, bijection, backbone, grad):
        transform = make_transform(4, 5, Strided(columns=3), bijection, backbone, rule)
        transform = shaken(transform).eval()
        x = torch.randint(4, (2, 3, 5))
        one_hot = to_one_hot(x, 4)
        with torch.set_grad_enabled(grad):
            for function in (transform, transform.inverse, transform.inv):
                expected, result = function(x), function(one_hot)
                assert torch.equal(result, to_one_hot(expected, 4))
                zeros = transform.log_abs_det_jacobian(one_hot, result)
                assert torch.equal(zeros, torch.zeros(2, 3))

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
    def test_values_stay_exactly_one_hot_over_64_transforms(self, bijection):
        stack = Composition(
            [make_transform(5, 4, Parity(first=n % 2), bijection) for n in range(64)]
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
        transform = shaken(make_transform(5, 4, Parity(), bijection, backbone))
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
        transform = shaken(make_transform(6, 4, Natural(), "rank", backbone, context=Context(2)))
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
            y, iterations = transform.generate(x, fixed_point=True)
            assert torch.equal(y, transform(x))
        assert iterations <= transform.passes + 1

    def test_the_identity_is_found_at_once(self):
        transform = make_transform(5, 5, Natural(), backbone="causal")
        x = torch.randint(5, (4, 5))
        with torch.no_grad():
            assert transform.generate(x, fixed_point=True)[1] == 1


class TestTraining:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("backbone", ["causal", "causal-convolution", "masked"])
    def test_every_parameter_receives_a_gradient(self, rule, bijection, backbone):
        if bijection == "rank" and rule != "straight-through":
            pytest.skip("ranks have no rule")
        transform = make_transform(5, 6, Strided(columns=3), bijection, backbone, rule)
        transform = shaken(transform)
        x = transform.inverse(to_one_hot(torch.randint(5, (60, 6)), 5))
        (x * torch.randn(5)).sum().backward()
        for name, parameter in transform.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name

    def test_a_gradient_reaches_the_value_through_every_way(self):
        # Base → data with one-hot vectors: by the value itself, and by what it conditions.
        transform = shaken(make_transform(5, 4, Natural(), "affine", "causal", "posterior"))
        x = to_one_hot(torch.randint(5, (6, 4)), 5).requires_grad_()
        (transform(x)[:, -1] * torch.randn(5)).sum().backward()
        assert x.grad.any(-1).all()


class TestFinite:
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_diverged_network_is_an_error_everywhere(self, bijection, backbone, training, value):
        transform = shaken(make_transform(3, 4, Natural(), bijection, backbone)).train(training)
        transform.conditioner.head.bias.data[1] = value
        x = torch.randint(3, (5, 4))
        one_hot = to_one_hot(x, 3)
        calls = [
            lambda: transform(x),
            lambda: transform.inv(x),
            lambda: transform.generate(x, fixed_point=True),
            lambda: transform.generate(x, prefix=x[:, :1]),
            lambda: transform.inverse(one_hot),
        ]
        for call in calls:
            for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
                with (
                    mode(),
                    pytest.raises(NonFiniteError, match=type(transform.bijection).__name__),
                ):
                    call()


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

    def test_repr_shows_the_choices(self):
        shown = repr(make_transform(5, 4, Strided(columns=2), "rank"))
        for part in (
            "RankPermutation(num_classes=5)",
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


class TestConstruction:
    def test_bijection_and_conditioner_must_fit(self):
        with pytest.raises(
            UserError, match="a ModularAffine of 3 classes was given a conditioner of 4"
        ):
            ConditionalTransform(ModularAffine(3), make_conditioner(4, 5, Parity()))
        with pytest.raises(
            UserError, match="reads 6 logits, and the conditioner has 3: give it num_"
        ):
            ConditionalTransform(ModularAffine(3), make_conditioner(3, 5, Parity()))

    @pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
    def test_a_single_dimension_is_nothing_to_transform(self, ordering):
        if ordering.levels(1).max() == 0:
            with pytest.raises(UserError, match="all 1 dimensions the same level"):
                make_transform(3, 1, ordering, "rank")

    def test_nor_is_a_single_level(self):
        with pytest.raises(
            UserError, match=r"Strided\(columns=1\) gives all 5 dimensions the same"
        ):
            make_transform(3, 5, Strided(columns=1), "rank")

    def test_behind_a_context_a_single_dimension_is(self):
        ordering = BehindContext(Natural())
        transform = shaken(make_transform(3, 1, ordering, "rank", "causal", context=Context(2)))
        x, context = states(3, 1), torch.randn(3, 2)
        with torch.no_grad():
            assert torch.equal(transform.inverse(transform(x, context), context), x)
        assert transform.passes == 1

    @pytest.mark.parametrize("length", [2, 3, 7])
    @pytest.mark.parametrize("ordering", [Parity(), Parity(first=1)], ids=str)
    def test_parts_may_be_unequal(self, length, ordering):
        transform = shaken(make_transform(2, length, ordering, ModularAffine(2)))
        assert_bijection_of_all_states(transform, 2, length)

    def test_it_is_of_the_conditioner_that_it_was_given(self):
        conditioner = Conditioner(3, 5, Strided(columns=2), LSTM(WIDTH, bidirectional=True))
        transform = ConditionalTransform(RankPermutation(3), conditioner)
        assert transform.conditioner is conditioner
        assert (transform.length, transform.ordering) == (5, Strided(columns=2))
        assert transform.transformed(torch.zeros(1, 5)).tolist() == [1, 3]
        assert transform.parts == [transform]


class TestHalfPrecision:
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("backbone", ["causal", "causal-convolution", "masked"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_values_come_back(self, bijection, backbone, dtype):
        transform = shaken(make_transform(5, 6, Natural(), bijection, backbone)).to(dtype)
        x = torch.randint(5, (100, 6))
        with torch.no_grad():
            assert torch.equal(transform.inv(transform(x)), x)
            one_hot = to_one_hot(x, 5, dtype)
            assert transform.inverse(one_hot).dtype == dtype
            assert torch.equal(transform.inverse(one_hot).argmax(-1), transform.inverse(x))
