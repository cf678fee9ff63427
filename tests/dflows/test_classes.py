"""Numbers of classes, and flows over dimensions of different ones, by enumeration."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflows import DiscreteFlow, PermutationTransform, flows
from dflows.backbones import LSTM, MADE, DilatedConvolution, Transformer
from dflows.bases import AutoregressiveBase, FactorizedBase, NGramBase
from dflows.bijections import ModularAffine, RankPermutation
from dflows.checks import check_flow
from dflows.classes import Classes
from dflows.conditioner import Conditioner
from dflows.errors import UserError
from dflows.exact import expected_log_likelihood, probabilities
from dflows.orderings import Natural, Parity, Reversed, Strided
from dflows.transforms import Composition, ConditionalTransform
from tests.dflows.small import (
    BIJECTIONS,
    BOTH_PARITIES,
    OBJECTIVES,
    WIDTH,
    gradients,
    prepared,
    shaken,
)

NUMBERS = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@given(NUMBERS)
def test_all_states_are_listed_once(numbers):
    classes = Classes(numbers, len(numbers))
    states = classes.states()
    assert len(states) == len(states.unique(dim=0)) == classes.count()
    assert classes.contains(states).all()
    assert not classes.contains(states + classes.numbers).any()
    for length in range(1, len(numbers) + 1):
        shorter = classes.states(length=length)
        assert shorter.shape == (classes.count(length), length)
        assert len(shorter.unique(dim=0)) == len(shorter)


@given(st.integers(1, 5), st.integers(1, 4))
def test_one_number_for_all_is_as_many_for_each(number, length):
    one, each = Classes(number, length), Classes([number] * length, length)
    assert torch.equal(one.states(), each.states())
    assert (one.largest, one.count()) == (each.largest, each.count())
    assert one.absent is None
    assert not each.absent.any()
    assert (one == each) is False, "dimensions of the one share what those of the other have alone"


def test_each_class_of_a_dimension_is_drawn_as_often():
    classes = Classes([1, 2, 5], 3)
    y = classes.draw((60_000, 3))
    for dimension, number in enumerate(classes.each):
        shares = y[:, dimension].bincount(minlength=5) / len(y)
        assert shares[:number].tolist() == pytest.approx([1 / number] * number, abs=0.02)
        assert not shares[number:].any()


@pytest.mark.parametrize("numbers", [4, [2, 5, 3]])
def test_other_values_are_all_but_the_given(numbers):
    classes = Classes(numbers, 3)
    y = classes.draw((30_000, 3))
    other = classes.other(y)
    assert classes.contains(other).all()
    assert (other != y).all()
    for dimension, number in enumerate(classes.numbers.tolist()):
        steps = (other - y)[:, dimension] % number
        shares = steps.bincount(minlength=number) / len(y)
        assert shares[1:].tolist() == pytest.approx([1 / (number - 1)] * (number - 1), abs=0.02)


def test_of_one_class_there_is_no_other():
    y = torch.zeros(3, 2, dtype=torch.long)
    assert Classes([1, 2], 2).other(y).tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([2, 3], "num_classes has 2 numbers, and there are 3 dimensions: give one for each"),
        ([], "num_classes is empty"),
        ([2, 0, 3], r"num_classes is \(2, 0, 3\): give at least 1"),
        (0, "num_classes is 0: give at least 1"),
    ],
)
def test_other_numbers_are_refused(numbers, message):
    with pytest.raises(UserError, match=message):
        Classes(numbers, 3)


SIZES = (2, 5, 3, 4)
BACKBONES = {
    "transformer": lambda: Transformer(WIDTH, layers=1, heads=2),
    "lstm": lambda: LSTM(WIDTH),
    "made": lambda: MADE(WIDTH, len(SIZES)),
    "masked": lambda: DilatedConvolution(WIDTH, layers=2),
}


def made(orderings, bijection="rank", backbone="masked", sizes=SIZES, **options):
    """A flow over dimensions of these numbers of classes, on a factorized base by default."""
    torch.manual_seed(0)
    make = BIJECTIONS[bijection]
    flow = flows.stack(sizes, len(sizes), orderings, BACKBONES[backbone], make, **options)
    return shaken(flow).eval()


def model(backbone="transformer", ordering=None, sizes=SIZES):
    torch.manual_seed(0)
    make = BACKBONES[backbone]
    return shaken(flows.language_model(sizes, len(sizes), make, ordering=ordering)).eval()


EVERY = {f"{name} {backbone}": (name, backbone) for name in BIJECTIONS for backbone in BACKBONES}


def assert_exact(flow):
    """All states have the mass of 1 together, and come from as many values of the base."""
    states = flow.classes.states()
    assert flow.log_prob(states).double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    x = flow.inverse(states)
    assert flow.classes.contains(x).all()
    assert len(x.unique(dim=0)) == len(states)
    for transform in flow.transforms:
        assert torch.equal(transform(transform.inverse(states)), states)
        assert torch.equal(transform.inv(transform(states)), states)


class TestFlows:
    @pytest.mark.parametrize("name", EVERY)
    def test_every_state_has_its_probability_and_no_other_value_has_any(self, name):
        bijection, backbone = EVERY[name]
        second = Natural() if backbone == "lstm" else Parity(first=1)
        flow = made([Reversed(), second, Strided(2)], bijection, backbone)
        assert_exact(flow)
        assert_exact(
            made(
                [Reversed()],
                bijection,
                backbone,
                base=flows.AutoregressiveFactory(BACKBONES[backbone]()),
            )
        )
        check_flow(flow)

    @settings(max_examples=15)
    @given(st.lists(st.integers(2, 4), min_size=2, max_size=4), st.sampled_from([*BIJECTIONS]))
    def test_whatever_the_numbers(self, sizes, bijection):
        assert_exact(made([Natural(), Reversed()], bijection, "masked", sizes))

    @pytest.mark.parametrize("backbone", BACKBONES)
    @pytest.mark.parametrize("ordering", [Natural(), Reversed(), Strided(2)], ids=str)
    def test_models_without_transforms_too(self, backbone, ordering):
        flow = model(backbone, ordering)
        assert_exact(flow)
        check_flow(flow)
        conditionals = flow.base.conditionals(flow.classes.states()).exp()
        torch.testing.assert_close(conditionals.sum(-1), torch.ones(conditionals.shape[:2]))
        assert not conditionals[:, flow.classes.absent].any()

    @pytest.mark.parametrize(
        "flow",
        [made(BOTH_PARITIES), made([Natural()], "affine", "transformer"), model(), model("lstm")],
    )
    def test_samples_have_their_probabilities_in_every_way_that_they_are_drawn(self, flow):
        generator = torch.Generator().manual_seed(1)
        y = flow.sample((20_000,), generator=generator)
        assert flow.classes.contains(y).all()
        again = flow.sample((500,), generator=generator.manual_seed(1), method="fixed_point")
        first = flow.sample((500,), generator=generator.manual_seed(1))
        assert torch.equal(first, again)
        assert flow.classes.contains(flow.sample((500,), temperature=5.0)).all()
        assert flow.classes.contains(flow.greedy()).all()
        states = flow.classes.states()
        strides = torch.tensor([1, *torch.tensor(SIZES).cumprod(0)[:-1]])
        counts = (y * strides).sum(-1).bincount(minlength=len(states))
        probs = flow.log_prob(states).double().exp().detach()
        error = (counts / len(y) - probs).abs() / (probs * (1 - probs) / len(y)).sqrt()
        assert error.max() < 5
        assert (error**2).mean() < 1.5

    def test_noise_next_to_one_draws_a_class_that_there_is(self):
        for flow in (made([]), model()):
            noise = torch.full((1, 4), 1 - 2**-24, dtype=torch.double)
            assert flow.classes.contains(flow.base.from_noise(noise)[0]).all()

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_objectives_are_the_likelihood_and_give_absent_classes_no_gradient(self, objective):
        flow = made(BOTH_PARITIES, "rank").double().train()
        objective = prepared(objective, flow).double()
        y = flow.sample((64,))
        for progress in (0.1, 0.4, 0.6, 0.9):  # in all stages of those that have some
            value = objective(flow, y, progress=progress)
            assert value.isfinite().all()
            value.sum().backward()
        found = gradients(flow)
        assert found
        for name, gradient in found.items():
            assert gradient.isfinite().all(), name
            if "head" in name:
                absent = flow.classes.absent
                assert not gradient[absent].any(), name

    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("objective", ["end-to-end", "local"])
    def test_equal_numbers_are_one_number(self, bijection, objective):
        """The same network gives the same likelihoods, and all heads together its gradient."""
        one = made(BOTH_PARITIES, bijection, sizes=(3,) * 4).double()
        alike = flows.stack(3, 4, list(BOTH_PARITIES), BACKBONES["masked"], BIJECTIONS[bijection])
        alike = alike.double()
        with torch.no_grad():
            for own, shared in zip(one.transforms, alike.transforms, strict=True):
                head, values = shared.conditioner.head, shared.conditioner.embedding.values
                shared.load_state_dict(
                    {
                        **shared.state_dict(),
                        **{
                            key: value
                            for key, value in own.state_dict().items()
                            if "head" not in key and "values" not in key and "members" not in key
                        },
                    }
                )
                own.bijection.members["3"].load_state_dict(shared.bijection.state_dict())
                own.conditioner.head.weight.copy_(head.weight)
                own.conditioner.head.bias.copy_(head.bias)
                own.conditioner.embedding.values.copy_(values.repeat(4, 1))
            one.base.logits.copy_(alike.base.logits)
        y = one.classes.states()
        torch.testing.assert_close(one.log_prob(y), alike.log_prob(y))
        found = []
        for flow in (one, alike):
            torch.manual_seed(0)
            prepared(objective, flow).double()(flow, y).sum().backward()
            found.append(gradients(flow))
        own, shared = found
        for name, gradient in shared.items():
            if "head" in name:
                torch.testing.assert_close(own[name].sum(0), gradient)
            elif "embedding.values" in name:
                torch.testing.assert_close(own[name].view(4, 3, -1).sum(0), gradient)
            elif "bijection" not in name:
                torch.testing.assert_close(own[name], gradient)


def test_a_factorized_base_shares_among_dimensions_of_as_many_classes():
    base = FactorizedBase((2, 3, 2, 3, 3), 5)
    base.adapt([Strided(columns=2)])
    assert base.groups.tolist() == [0, 2, 0, 2, 1]
    x = Classes((2, 3, 2, 3, 3), 5).draw((1000, 5))
    base.refit(base.count(x))
    base.init_from_counts(torch.tensor([5, 4, 3]))
    total = base.log_prob(base.classes.states()).sum(-1).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0))


def test_initial_likelihoods_are_those_of_the_counts():
    flow = flows.language_model(SIZES, 4, BACKBONES["transformer"])
    counts = torch.tensor([[5, 2, 0, 0, 0], [1, 2, 3, 4, 5], [1, 1, 7, 0, 0], [9, 1, 1, 1, 0]])
    flow.base.init_from_counts(counts)
    expected = (counts + 1).masked_fill(flow.classes.absent, 0).double()
    expected = (expected / expected.sum(-1, keepdim=True)).float()
    found = flow.base.conditionals(torch.zeros(1, 4, dtype=torch.long))[0].exp()
    torch.testing.assert_close(found, expected)


def test_the_support_is_that_of_every_dimension():
    distribution = made(BOTH_PARITIES)()
    assert distribution.support.check(torch.tensor([1, 4, 2, 3]))
    assert not distribution.support.check(torch.tensor([2, 4, 2, 3]))
    assert distribution.mode.shape == (4,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made([]).log_prob(torch.tensor([0, 0, 3, 0])), "a value of 3 at dimension 2 lies"),
        (lambda: made([Natural()]).with_length(3), "3 dimensions were asked for, and a base"),
        (
            lambda: model("lstm", Strided(2)).with_length(3),
            "the 4 dimensions have classes of their own",
        ),
        (lambda: NGramBase(SIZES, 4), "an NGramBase counts the same classes in all dimensions"),
        (
            lambda: flows.language_model(SIZES, 4, ngram_order=3),
            "ngram_order is 3, and num_classes has a number for each dimension",
        ),
        (
            lambda: DiscreteFlow(FactorizedBase(SIZES, 4), [PermutationTransform([1, 0, 2, 3])]),
            "a PermutationTransform makes values of classes that their dimensions have not",
        ),
        (
            lambda: DiscreteFlow(FactorizedBase(5, 4), made([Natural()]).transforms),
            "a bijection of 2, 5, 3, 4 classes does not fit a base of 5",
        ),
        (
            lambda: ConditionalTransform(
                RankPermutation(5), Conditioner(SIZES, 4, Natural(), LSTM(WIDTH))
            ),
            "a RankPermutation of 5 classes was given a conditioner of 2, 5, 3, 4",
        ),
        (lambda: flows.bipartite((2, 3), 4), "num_classes has 2 numbers, and there are 4"),
        (lambda: flows.bipartite([], 4), "num_classes is empty"),
        (lambda: flows.bipartite([2.5, 3], 2), r"num_classes is \[2.5, 3\]: give a whole number"),
        (
            lambda: DiscreteFlow(FactorizedBase((3, 2, 3), 3), [PermutationTransform([2, 1, 0])]),
            "a PermutationTransform makes values of classes that their dimensions have not",
        ),
        (
            lambda: DiscreteFlow(
                FactorizedBase((2, 5), 2), [Composition([PermutationTransform([1, 0])]).inv]
            ),
            "a Inverse makes values of classes that their dimensions have not",
        ),
        (
            lambda: model().sample((2,), method="fixed_point", draft=NGramBase(5, 4, order=2)),
            "the draft has num_classes 5, and the flow 2, 5, 3, 4",
        ),
        (
            lambda: AutoregressiveBase(Conditioner(SIZES, 4, Natural(), LSTM(WIDTH), num_logits=5)),
            "the conditioner was given num_logits: leave it out",
        ),
        (lambda: probabilities(model()), "have 2, 5, 3, 4 classes, and a table is of one number"),
        (
            lambda: expected_log_likelihood(made([Natural()], "shift")),
            "have 2, 5, 3, 4 classes, and a table is of one number",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_exchanging_dimensions_of_as_many_classes_is_a_bijection():
    swap = PermutationTransform([1, 0, 2])
    flow = DiscreteFlow(shaken(FactorizedBase((2, 2, 3), 3)), [swap])
    assert_exact(flow)
    assert flow.log_prob(flow.classes.states(length=1)).exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("numbers", [np.array(SIZES), torch.tensor(SIZES), torch.Size(SIZES)])
def test_numbers_may_be_of_any_integer_type(numbers):
    for name in BIJECTIONS:
        assert flows.autoregressive(numbers, 4, bijection=BIJECTIONS[name]).classes.each == SIZES
    for number in (np.int64(3), torch.tensor(3)):
        assert flows.bipartite(number, 4).classes.each is None
        assert NGramBase(number, 4).num_classes == 3


def test_dimensions_start_peaked_among_their_own_classes():
    base = FactorizedBase((2, 12, 3), 3)
    base.adapt([Natural()])
    probs = base.log_prob(torch.zeros(1, 3, dtype=torch.long)).exp()
    torch.testing.assert_close(probs[0, 1:], torch.full((2,), 0.5))


def test_bijections_of_several_kinds_read_logits_of_their_own():
    def kind(number):
        return ModularAffine(number) if number < 4 else RankPermutation(number)

    assert_exact(shaken(flows.autoregressive((6, 3), 2, BACKBONES["lstm"], bijection=kind)))


@pytest.mark.parametrize("objective", ["local", "local-levels", "end-to-end"])
def test_every_parameter_has_a_gradient_even_of_classes_that_are_not_transformed(objective):
    """Processes that train together wait for each."""
    flow = made([Natural()], "matched", "transformer", (2, 5, 3)).train()
    prepared(objective, flow)(flow, flow.classes.draw((4, 3))).sum().backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())
