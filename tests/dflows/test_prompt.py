"""Samples given how they begin: exact where a flow can have them, and refused elsewhere."""

import pytest
import torch

from dflows import (
    AutoregressiveBase,
    Context,
    DiscreteFlow,
    FactorizedBase,
    NGramBase,
    PermutationTransform,
)
from dflows.backbones import LSTM, LevelConvolution, Masked, Transformer
from dflows.errors import UserError
from dflows.orderings import Blocks, Halves, Natural, Parity, Reversed, Strided
from dflows.transforms import Composition
from tests.dflows.small import WIDTH, make_conditioner, make_flow, make_transform, shaken, states

CLASSES, LENGTH = 3, 4
NATURAL = (Natural(), Natural())


def language_model(backbone, ordering=None, transforms=(), **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conditioner = make_conditioner(
            CLASSES, LENGTH, ordering or Natural(), backbone(), **options
        )
        base = AutoregressiveBase(conditioner)
    return shaken(DiscreteFlow(base, transforms))


def counted():
    base = NGramBase(CLASSES, LENGTH, order=3)
    base.count([torch.randint(CLASSES, (500,), generator=torch.Generator().manual_seed(0))])
    return base


def under_flow(base):
    return shaken(DiscreteFlow(base, [make_transform(CLASSES, LENGTH, Natural(), "rank")]))


FLOWS = {
    "transformer": lambda: language_model(lambda: Transformer(WIDTH, layers=1, heads=2)),
    "lstm": lambda: language_model(lambda: LSTM(WIDTH)),
    "convolution": lambda: language_model(lambda: LevelConvolution(WIDTH, layers=1)),
    "masked": lambda: language_model(lambda: Masked(torch.nn.Linear(WIDTH, WIDTH), WIDTH)),
    "blocks": lambda: language_model(lambda: LevelConvolution(WIDTH, layers=1), Blocks(2)),
    "n-gram": lambda: DiscreteFlow(counted()),
    "n-gram under a flow": lambda: under_flow(counted()),
    "affine flows": lambda: make_flow(orderings=NATURAL, backbone="causal"),
    "rank flows, masked": lambda: make_flow(orderings=NATURAL, bijection="rank"),
    "shift flow by blocks": lambda: make_flow(orderings=(Blocks(2),), bijection="shift"),
    "halves": lambda: make_flow(orderings=(Halves(),), bijection="rank"),
    "flow on a language model": lambda: language_model(
        lambda: LSTM(WIDTH), transforms=[make_transform(CLASSES, LENGTH, Natural(), "affine")]
    ),
    "permutation": lambda: shaken(
        DiscreteFlow(
            FactorizedBase(CLASSES, LENGTH),
            [
                make_transform(CLASSES, LENGTH, Natural(), "rank"),
                PermutationTransform([1, 0, 3, 2]),
                make_transform(CLASSES, LENGTH, Natural(), "affine"),
            ],
        )
    ),
}


def prompts_of(name):
    return (2,) if name == "permutation" else (1, 2, 3, 4)


@pytest.mark.parametrize("method", ["levels", "fixed_point"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_sample_is_gone_on_with_as_it_went_on(name, method):
    # All the randomness is a number a dimension, so that the rest is the same, whatever it was
    # that settled the beginning.
    flow = FLOWS[name]().eval()

    def draw(**options):
        return flow.sample((64,), generator=torch.Generator().manual_seed(1), **options)

    samples = draw()
    for number in prompts_of(name):
        again = draw(prompt=samples[:, :number], method=method)
        assert torch.equal(again, samples)
    if name != "permutation":
        shorter = draw(length=3)
        assert torch.equal(draw(length=3, prompt=shorter[:, :2]), shorter)


@pytest.mark.parametrize("name", FLOWS)
def test_samples_follow_the_conditional_probabilities(name):
    flow, number = FLOWS[name]().eval(), 2
    everything = states(CLASSES, LENGTH)
    prompt = torch.tensor([2, 1])
    given = everything[(everything[:, :number] == prompt).all(-1)]
    with torch.no_grad():
        probs = flow.log_prob(given).softmax(-1).double()
    size = 20_000
    samples = flow.sample((size,), prompt=prompt, generator=torch.Generator().manual_seed(2))
    assert (samples[:, :number] == prompt).all()
    cells = (samples[:, number:] * torch.tensor([3, 1])).sum(-1)
    share = cells.bincount(minlength=len(given)) / size
    assert ((share - probs).abs() < 4.5 * (probs * (1 - probs) / size).sqrt() + 1e-9).all()


def test_a_composition_goes_on_as_its_parts_do():
    parts = [make_transform(CLASSES, LENGTH, Natural(), "rank") for _ in range(2)]
    composition = shaken(Composition(parts)).eval()
    assert composition.supports_prefix(2, LENGTH)
    x = states(CLASSES, LENGTH)
    with torch.no_grad():
        y = composition(x)
        assert torch.equal(composition.generate(x, prefix=y[:, :2])[0], y)
        inverse = composition.inv
        assert inverse.supports_prefix(2, LENGTH)
        assert torch.equal(inverse.generate(y, prefix=x[:, :2])[0], x)


def test_a_prompt_goes_with_a_context():
    flow = make_flow(orderings=NATURAL, backbone="causal", context=Context(2))
    context = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))

    def draw(**options):
        generator = torch.Generator().manual_seed(1)
        return flow.sample((5,), context, generator=generator, **options)

    samples = draw()
    assert samples.shape == (5, 3, LENGTH)
    assert torch.equal(draw(prompt=samples[..., :2]), samples)
    assert (draw(prompt=torch.tensor([1]))[..., 0] == 1).all()


REFUSED = {
    "parity": lambda: make_flow(),
    "one of two": lambda: make_flow(orderings=(Natural(), Parity())),
    "reversed": lambda: make_flow(orderings=(Reversed(),)),
    "few passes": lambda: language_model(lambda: LevelConvolution(WIDTH, layers=1), Strided(2)),
    "reversed permutation": lambda: DiscreteFlow(counted(), [PermutationTransform([3, 2, 1, 0])]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_conditioned_on_is_refused_with_the_reason(name):
    flow = REFUSED[name]()
    with pytest.raises(UserError, match=r"exactly: in \w+.* depend on later dimensions"):
        flow.sample((2,), prompt=torch.tensor([1, 1]))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.tensor([1, 3]), "a value of 3 lies outside 0..2"),
        (torch.tensor([1.0]), "give indices"),
        (torch.zeros(5, dtype=torch.long), "samples have 4 dimensions: give it 1 to that many"),
        (torch.zeros(0, dtype=torch.long), "give it 1 to that many"),
        (torch.tensor(1), "give it 1 to that many"),
        (torch.zeros(3, 1, dtype=torch.long), r"one for all, \(1,\), or one a sample, \(2, 1\)"),
    ],
)
def test_prompts_that_are_none_are_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        make_flow(orderings=NATURAL).sample((2,), prompt=prompt)


def test_it_says_how_many_evaluations_were_needed():
    flow = make_flow(orderings=NATURAL, backbone="causal")
    flow.sample((4,))
    assert flow.evaluations == [0, 3, 3]
    flow.sample((4,), method="fixed_point")
    assert flow.evaluations[0] == 0
    assert all(1 <= number <= 4 for number in flow.evaluations[1:])
