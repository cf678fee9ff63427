"""From noise to samples: what each part is handed, and which options are refused."""

import pytest
import torch

from dflows.acceleration import Acceleration
from dflows.backbones import DilatedConvolution, LevelConvolution
from dflows.bases import AutoregressiveBase, FactorizedBase, NGramBase
from dflows.conditioner import Conditioner, Context
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.generation import check_sampling, expand_prompt, generate
from dflows.ngrams import NGramExpert
from dflows.orderings import Blocks, Natural, Parity, Strided
from dflows.transforms import PermutationTransform
from tests.dflows.small import ORDERINGS, WIDTH, make_flow, make_transform, markov, shaken

CLASSES, LENGTH = 3, 4


@pytest.mark.parametrize(
    ("temperature", "method", "message"),
    [
        (0, "levels", "temperature is 0: give a positive number"),
        (float("nan"), "levels", "temperature is nan"),
        (float("inf"), "levels", "temperature is inf"),
        (1.0, "guess", "method is 'guess': give 'levels' or 'fixed_point'"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(temperature, method, message):
    with pytest.raises(UserError, match=message):
        check_sampling(temperature, method, Acceleration())


def test_a_graph_cannot_look_whether_values_have_settled():
    check_sampling(1.0, "levels", Acceleration(cuda_graph=True))
    check_sampling(1.0, "fixed_point", Acceleration(compile=True))
    with pytest.raises(UserError, match="use method 'levels', or unset cuda_graph"):
        check_sampling(1.0, "fixed_point", Acceleration(cuda_graph=True))


LONG = 24


def language_model(num_classes, length, ordering=None, backbone=LevelConvolution, **options):
    """A random autoregressive base."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = backbone(WIDTH, layers=2)
        conditioner = Conditioner(num_classes, length, ordering or Natural(), network, **options)
    return shaken(AutoregressiveBase(conditioner)).eval()


def counted(num_classes=CLASSES, length=LONG, order=3):
    base = NGramBase(num_classes, length, order=order)
    base.count([markov(400, num_classes)])
    return base


def agreed(num_classes=CLASSES, length=LONG, order=3):
    """A network that says what n-grams do, and these n-grams."""
    draft, expert = counted(num_classes, length, order), NGramExpert(num_classes, order)
    expert.ngrams.load_state_dict(draft.ngrams.state_dict())
    base = language_model(num_classes, length, expert=expert)
    base.conditioner.init_head(torch.zeros(num_classes))
    torch.nn.init.zeros_(base.conditioner.gate.weight)
    torch.nn.init.ones_(base.conditioner.gate.bias)
    return base, draft


def draws(flow, number=8, **options):
    return flow.sample((number,), generator=torch.Generator().manual_seed(3), **options)


class TestDraft:
    @pytest.mark.parametrize("backbone", [LevelConvolution, DilatedConvolution])
    @pytest.mark.parametrize("ordering", [key for key in ORDERINGS if key != "odd-first"])
    @pytest.mark.parametrize(("num_classes", "order"), [(2, 4), (5, 1), (7, 3)])
    def test_samples_are_those_of_the_levels(self, num_classes, order, ordering, backbone):
        base = language_model(num_classes, 5, ORDERINGS[ordering], backbone)
        flow, draft = DiscreteFlow(base), counted(num_classes, 5, order)
        for options in ({}, {"temperature": 0.3}, {"length": 3}):
            if "length" in options and ordering == "permutation":
                continue
            expected = draws(flow, 30, **options)
            found = draws(flow, 30, method="fixed_point", draft=draft, **options)
            assert torch.equal(found, expected)
            assert 1 <= flow.evaluations[0] <= flow.passes + 1

    @pytest.mark.parametrize("ordering", [Natural(), Blocks(2)], ids=str)
    @pytest.mark.parametrize("number", [1, 5, LONG])
    def test_it_goes_on_from_a_prompt(self, ordering, number):
        flow = DiscreteFlow(language_model(CLASSES, LONG, ordering))
        prompt = torch.randint(CLASSES, (8, number))
        expected = draws(flow, prompt=prompt)
        found = draws(flow, method="fixed_point", draft=counted(), prompt=prompt)
        assert torch.equal(found, expected)
        assert (flow.evaluations[0] == 0) == (number == LONG)

    def test_it_knows_nothing_of_a_context_and_goes_with_one(self):
        flow = DiscreteFlow(language_model(CLASSES, LONG, context=Context(2)))
        context = torch.randn(3, 2)
        found = draws(flow, context=context, method="fixed_point", draft=counted())
        assert found.shape == (8, 3, LONG)
        assert torch.equal(found, draws(flow, context=context))

    def test_transforms_go_on_from_the_same_values(self):
        base, draft = agreed()
        flow = DiscreteFlow(base, [shaken(make_transform(CLASSES, LONG, Natural(), "rank"))])
        found = draws(flow, method="fixed_point", draft=draft)
        assert flow.evaluations[0] == 1
        assert torch.equal(found, draws(flow))

    def test_where_classes_tie_samples_are_the_same(self):
        base = language_model(4, LONG)
        base.conditioner.init_head(torch.zeros(4))
        flow = DiscreteFlow(base)
        noise = torch.randint(8, (6, LONG)) / 8  # on the borders of the classes
        flow.base.noise = lambda *_: noise
        found = draws(flow, 6, method="fixed_point", draft=counted(4))
        assert torch.equal(found, draws(flow, 6))

    def test_a_network_that_says_the_same_is_evaluated_once(self):
        base, draft = agreed()
        flow = DiscreteFlow(base)
        expected = draws(flow)
        assert torch.equal(draws(flow, method="fixed_point", draft=draft), expected)
        assert flow.evaluations == [1]

    def test_an_expert_drafts_by_itself(self):
        flow = DiscreteFlow(agreed()[0])
        expected = draws(flow)
        assert torch.equal(draws(flow, method="fixed_point"), expected)
        assert flow.evaluations == [1]

    def test_one_that_is_given_goes_before_the_expert(self):
        base, _ = agreed()
        flow, unlike = DiscreteFlow(base), NGramBase(CLASSES, LONG, order=2)
        expected = draws(flow)
        assert torch.equal(draws(flow, method="fixed_point", draft=unlike), expected)
        assert flow.evaluations[0] > 1

    @pytest.mark.parametrize(
        ("flow", "draft", "method", "message"),
        [
            (0, counted(), "levels", "method is 'levels', which guesses nothing: give method 'fix"),
            (1, counted(), "fixed_point", "and FactorizedBase is sampled without a network: leave"),
            (0, counted(2), "fixed_point", "the draft has num_classes 2, and the flow 3: give one"),
            (0, counted(3, 9), "fixed_point", "the draft has length 9, and the flow 24: give one"),
            (
                0,
                language_model(CLASSES, LONG),
                "fixed_point",
                "the draft, AutoregressiveBase, guesses nothing without a network: give an NGramB",
            ),
            (0, DiscreteFlow(counted()), "fixed_point", "the draft, DiscreteFlow, guesses nothing"),
        ],
    )
    def test_what_cannot_guess_is_refused(self, flow, draft, method, message):
        bases = (language_model(CLASSES, LONG), FactorizedBase(CLASSES, LONG))
        with pytest.raises(UserError, match=message):
            DiscreteFlow(bases[flow]).sample((2,), method=method, draft=draft)


class TestPrompt:
    parts = (FactorizedBase(CLASSES, LENGTH),)

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
    def test_it_is_repeated_for_every_sample(self, shape):
        shape, prompt = torch.Size(shape), torch.tensor([2, 1])
        expanded = expand_prompt(prompt, shape, LENGTH, self.parts)
        assert torch.equal(expanded, prompt.expand(shape.numel(), 2))
        own = torch.randint(CLASSES, (*shape, 2))
        assert torch.equal(expand_prompt(own, shape, LENGTH, self.parts), own.reshape(-1, 2))

    def test_every_part_must_support_it(self):
        parts = [*self.parts, *make_flow(CLASSES, LENGTH, [Natural(), Parity()]).transforms]
        prompt = torch.tensor([2, 1])
        with pytest.raises(UserError, match=r"ConditionalTransform over Parity\(first=0\) they"):
            expand_prompt(prompt, torch.Size((2,)), LENGTH, parts)
        expand_prompt(prompt, torch.Size((2,)), LENGTH, parts[:2])


class TestGenerate:
    @pytest.mark.parametrize("fixed_point", [False, True])
    def test_parts_work_one_after_the_other(self, fixed_point):
        flow = make_flow(CLASSES, LENGTH, [Natural(), Strided(columns=3)], "rank")
        transforms = [flow.transforms[0], PermutationTransform([1, 0, 3, 2]), flow.transforms[1]]
        noise = flow.base.noise(50, LENGTH)
        with torch.no_grad():
            value, evaluations = generate(
                flow.base, transforms, noise, None, None, temperature=0.7, fixed_point=fixed_point
            )
            expected = flow.base.from_noise(noise, temperature=0.7)[0]
            for transform in transforms:
                expected = transform(expected)
        assert torch.equal(value, expected)
        assert len(evaluations) == 4
        assert evaluations[0] == evaluations[2] == 0
        if fixed_point:
            assert all(1 <= count <= 4 for count in (evaluations[1], evaluations[3]))
        else:
            assert evaluations == [0, 3, 0, 2]

    def test_of_a_prefix_every_part_is_given_its_own(self):
        flow = make_flow(CLASSES, LENGTH, [Natural(), Natural()], "affine")
        noise, prompt = flow.base.noise(50, LENGTH), torch.randint(CLASSES, (50, 2))
        options = {"temperature": 1.0, "fixed_point": False}
        with torch.no_grad():
            y, _ = generate(flow.base, flow.transforms, noise, None, prompt, **options)
            x = flow.residuals(y)[-1]
        assert torch.equal(y[:, :2], prompt)
        # The rest is what the noise says of x.
        assert torch.equal(x[:, 2:], flow.base.from_noise(noise)[0][:, 2:])


def test_noise_is_all_the_randomness():
    base = shaken(FactorizedBase(CLASSES, LENGTH))
    noise = base.noise(20, LENGTH, torch.Generator().manual_seed(0))
    assert noise.shape == (20, LENGTH)
    state = torch.get_rng_state()
    with torch.no_grad():
        generate(base, [], noise, None, None, temperature=1.0, fixed_point=False)
    assert torch.equal(torch.get_rng_state(), state)
