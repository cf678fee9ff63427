"""Values decided level by level, or all at once until nothing changes."""

import pytest
import torch

from dflows.backbones import LSTM, MADE, DilatedConvolution, LevelConvolution, Table, Transformer
from dflows.conditioner import Conditioner, Context
from dflows.decoding import AHEAD, decide_levels, solve_fixed_point
from dflows.orderings import BehindContext, Blocks, Natural, Reversed, Strided
from dflows.representations import to_one_hot
from tests.dflows.small import ORDERINGS, WIDTH, shaken

CLASSES, LENGTH = 3, 5
BACKBONES = {
    "transformer": lambda _: Transformer(WIDTH, layers=2, heads=2),
    "convolution": lambda _: LevelConvolution(WIDTH, layers=2, distances=(1, 2), window=1),
    "made": lambda _: MADE(WIDTH, length=LENGTH + 3, hidden=32),
    "lstm": lambda _: LSTM(WIDTH),
    "table": lambda ordering: Table(WIDTH, CLASSES, LENGTH, ordering),
    "masked": lambda _: DilatedConvolution(WIDTH, layers=2),
}
CASES = [
    pytest.param(name, ordering, id=f"{name}-{key}")
    for name in BACKBONES
    for key, ordering in ORDERINGS.items()
    if name != "lstm" or key in ("natural", "reversed")
]


def make(name, ordering, context=None):
    torch.manual_seed(0)
    backbone = BACKBONES[name](ordering)
    conditioner = Conditioner(CLASSES, LENGTH, ordering, backbone, 4, context)
    return shaken(conditioner).eval()


def values(count=6):
    return torch.randint(CLASSES, (count, LENGTH))


def largest(dimensions, logits):
    return logits[..., :CLASSES].argmax(-1)


def by_hand(conditioner, y, choose, first_level=0):
    """One level after the other, each from all logits."""
    levels = conditioner.ordering.levels(y.shape[1])
    for level in range(first_level, int(levels.max()) + 1):
        dimensions = (levels == level).nonzero().squeeze(-1)
        y = y.clone()
        y[:, dimensions] = choose(dimensions, conditioner(y)[:, dimensions])
    return y


@pytest.mark.parametrize(("name", "ordering"), CASES)
@pytest.mark.parametrize("first_level", [0, 1])
def test_levels_and_the_fixed_point_are_what_levels_by_hand_are(name, ordering, first_level):
    conditioner, y = make(name, ordering), values()
    with torch.no_grad():
        expected = by_hand(conditioner, y, largest, first_level)
        decided = decide_levels(conditioner, y, largest, first_level=first_level)
        found, iterations = solve_fixed_point(conditioner, y, largest, first_level=first_level)
    assert torch.equal(decided, expected)
    assert torch.equal(found, expected)
    assert 1 <= iterations <= conditioner.num_levels - first_level + 1
    below = ordering.levels(LENGTH) < first_level
    assert torch.equal(decided[:, below], y[:, below])
    with torch.no_grad():
        again, iterations = solve_fixed_point(conditioner, found, largest, first_level=first_level)
    assert torch.equal(again, found)
    assert iterations == 1


class TestDraft:
    @pytest.mark.parametrize(("name", "ordering"), CASES)
    @pytest.mark.parametrize("first_level", [0, 1])
    def test_whatever_it_guesses_the_values_are_the_same(self, name, ordering, first_level):
        conditioner, y = make(name, ordering), values()
        options = {"first_level": first_level}

        def guess(y, due):
            return torch.randint_like(y, CLASSES).where(due, y)

        with torch.no_grad():
            expected = decide_levels(conditioner, y, largest, **options)
            found, iterations = solve_fixed_point(conditioner, y, largest, drafter=guess, **options)
        assert torch.equal(found, expected)
        assert 1 <= iterations <= conditioner.num_levels - first_level + 1

    @pytest.mark.parametrize(("name", "ordering"), CASES)
    def test_what_guesses_right_is_confirmed_once(self, name, ordering):
        conditioner, y = make(name, ordering), values()
        with torch.no_grad():
            expected = decide_levels(conditioner, y, largest)
            found, iterations = solve_fixed_point(
                conditioner, y, largest, drafter=lambda y, due: expected.where(due, y)
            )
        assert torch.equal(found, expected)
        assert iterations == 1

    def test_it_goes_on_behind_what_has_settled(self):
        conditioner, y = make("transformer", Natural()), torch.zeros(3, LENGTH, dtype=torch.long)
        with torch.no_grad():
            expected = decide_levels(conditioner, y, largest, prefix_length=1)
        right = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
        asked = []

        def guess(y, due):
            asked.append(due)
            return expected.where(right, (expected + 1) % CLASSES).where(due, y)

        with torch.no_grad():
            found, iterations = solve_fixed_point(
                conditioner, y, largest, drafter=guess, prefix_length=1
            )
        assert torch.equal(found, expected)
        assert [due.int().tolist() for due in asked] == [
            [[0, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]],
            [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]],
            [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]],
        ]
        assert iterations == 3

    def test_it_guesses_so_many_levels_at_once(self):
        length = 2 * AHEAD + 1
        conditioner = Conditioner(CLASSES, length, Natural(), LSTM(WIDTH)).eval()
        asked = []

        def guess(y, due):
            asked.append(int(due.sum()))
            return y.where(~due, 1)

        y = torch.zeros(1, length, dtype=torch.long)
        with torch.no_grad():
            _, iterations = solve_fixed_point(
                conditioner,
                y,
                lambda _, logits: torch.ones_like(logits[..., 0]).long(),
                drafter=guess,
            )
        assert asked[0] == AHEAD
        assert iterations == 2


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("ordering", [Natural(), Blocks(size=2), Blocks(LENGTH)], ids=str)
def test_a_prefix_is_kept_and_conditioned_on(name, ordering):
    if name == "lstm" and not isinstance(ordering, Natural):
        pytest.skip("refused by the LSTM")
    conditioner, noise = make(name, ordering), torch.rand(6, LENGTH, CLASSES)

    def decide(dimensions, logits):
        return (logits[..., :CLASSES] + noise[:, dimensions]).argmax(-1)

    with torch.no_grad():
        whole = decide_levels(conditioner, torch.zeros_like(values()), decide)
        for known in range(LENGTH + 1):
            assert conditioner.supports_prefix(known or LENGTH, LENGTH)
            rest = torch.cat([whole[:, :known], values()[:, known:]], dim=1)
            decided = decide_levels(conditioner, rest, decide, prefix_length=known)
            assert torch.equal(decided, whole)
            found, iterations = solve_fixed_point(conditioner, rest, decide, prefix_length=known)
            assert torch.equal(found, whole)
            assert (iterations == 0) == (known == LENGTH)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "table"])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ordering", [Natural(), Reversed(), BehindContext(Reversed())])
def test_a_context_goes_along(name, aligned, ordering):
    first_level = int(isinstance(ordering, BehindContext))
    conditioner = make(name, ordering, Context(4, aligned=aligned))
    y, context = values(), torch.randn(6, LENGTH if aligned else 3, 4)
    options = {"first_level": first_level}
    with torch.no_grad():
        decided = decide_levels(conditioner, y, largest, context, **options)
        found, _ = solve_fixed_point(conditioner, y, largest, context, **options)
        logits = conditioner(decided, context)
    assert torch.equal(found, decided)
    assert torch.equal(largest(None, logits), decided)


@pytest.mark.parametrize("name", ["transformer", "masked"])
def test_one_hot_vectors_stay_what_they_are(name):
    conditioner, y = make(name, Strided(columns=3)), values()

    def decide(dimensions, logits):
        return to_one_hot(largest(dimensions, logits), CLASSES)

    vectors = decide_levels(conditioner, to_one_hot(y, CLASSES), decide, first_level=1)
    with torch.no_grad():
        indices = decide_levels(conditioner, y, largest, first_level=1)
    assert torch.equal(vectors, to_one_hot(indices, CLASSES))


def test_an_event_of_the_lowest_level_alone_takes_no_evaluation():
    conditioner, y = make("transformer", Strided(columns=3)), values()[:, :1]
    with torch.no_grad():
        assert torch.equal(decide_levels(conditioner, y, largest, first_level=1), y)
        found, iterations = solve_fixed_point(conditioner, y, largest, first_level=1)
    assert torch.equal(found, y)
    assert iterations == 0


@pytest.mark.parametrize("name", ["transformer", "convolution", "lstm"])
def test_cached_steps_are_taken_without_a_gradient_alone(name):
    conditioner, y = make(name, Natural()), values()
    evaluated = []
    conditioner.backbone.register_forward_hook(lambda *_: evaluated.append(1))
    with torch.no_grad():
        stepped = decide_levels(conditioner, y, largest)
    assert not evaluated
    assert torch.equal(decide_levels(conditioner, y, largest), stepped)
    assert evaluated
