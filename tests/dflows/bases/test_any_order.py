"""One network for all orderings: each is exact, and any dimensions are given any others."""

from itertools import permutations, product

import pytest
import torch

from dflows import flows
from dflows.backbones import LSTM, DilatedConvolution, Transformer
from dflows.bases import AnyOrderBase
from dflows.checks import check_flow
from dflows.completion import complete, log_prob_given
from dflows.conditioner import Conditioner
from dflows.embedding import Context
from dflows.errors import UserError
from dflows.ngrams import NGramExpert
from dflows.objectives import RandomOrderings
from dflows.orderings import BehindContext, Blocks, Natural, Permutation, Reversed, Strided
from lightning_modules import FlowModule, LanguageModel
from tests.dflows.small import WIDTH, shaken

SIZES = (2, 4, 3, 2)
BACKBONES = {
    "transformer": lambda: Transformer(WIDTH, layers=1, heads=2, attention="full"),
    "masked": lambda: DilatedConvolution(WIDTH, layers=2),
}
backbones = pytest.mark.parametrize("backbone", BACKBONES)
sizes = pytest.mark.parametrize("numbers", [3, SIZES], ids=str)


def made(backbone="transformer", numbers=SIZES, **options):
    torch.manual_seed(0)
    return shaken(flows.any_order(numbers, 4, BACKBONES[backbone], **options)).eval()


def by_hand(flow, y, order):
    """The log-probability of events, dimension after dimension in an order."""
    visible = torch.zeros(y.shape, dtype=torch.bool)
    total = torch.zeros(len(y))
    for dimension in order:
        logits = flow.base.conditioner.visible_logits(y, visible)[:, dimension]
        total += logits.log_softmax(-1).gather(-1, y[:, [dimension]]).squeeze(-1)
        visible[:, dimension] = True
    return total


@backbones
@sizes
def test_every_ordering_is_an_exact_distribution_of_one_network(backbone, numbers):
    flow = made(backbone, numbers)
    states = flow.classes.states()
    for ordering in (Natural(), Reversed(), Permutation([2, 0, 3, 1]), Strided(2), Blocks(3)):
        other = flow.with_ordering(ordering)
        assert other.passes == int(ordering.levels(4).max()) + 1
        log_prob = other.log_prob(states)
        torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0))
        if other.passes == 4:
            order = ordering.levels(4).argsort().tolist()
            torch.testing.assert_close(log_prob, by_hand(flow, states, order))
    check_flow(flow)
    check_flow(flow.with_ordering(Strided(2)))


def test_a_module_trains_it_over_all_orderings():
    assert isinstance(FlowModule(made()).objective, RandomOrderings)


def test_the_objective_estimates_the_mean_over_all_orders():
    flow, objective = made(), RandomOrderings()
    objective.prepare(flow)
    y = torch.tensor([1, 3, 0, 1])
    orders = [Permutation(order) for order in permutations(range(4))]
    expected = sum(flow.with_ordering(order).log_prob(y) for order in orders) / len(orders)
    with torch.no_grad():
        drawn = objective(flow, y.expand(40_000, -1)).double()
    error = drawn.std() / len(drawn) ** 0.5
    assert abs(drawn.mean() - expected) < 4 * error
    assert error < 0.02 * abs(expected)


@sizes
@pytest.mark.parametrize("ordering", [Natural(), Reversed(), Strided(2)], ids=str)
def test_values_that_are_not_known_are_drawn_as_they_are_scored(numbers, ordering):
    flow = made(numbers=numbers, ordering=ordering)
    y, known = torch.tensor([1, 2, 0, 1]), torch.tensor([False, True, False, True])
    states = flow.classes.states()
    fitting = states[(states == y)[:, known].all(-1)]
    log_prob = log_prob_given(flow, fitting, known)
    assert not log_prob[:, known].any()
    probs = log_prob.sum(-1).double().exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    if flow.passes == 4:  # the known ones first, then the others as the ordering has them
        unknown = [d for d in ordering.levels(4).argsort().tolist() if not known[d]]
        first = flow.with_ordering(Permutation([1, 3, *unknown])).log_prob(fitting)
        torch.testing.assert_close(probs.log().float(), first - first.logsumexp(0))
    generator = torch.Generator().manual_seed(0)
    drawn = complete(flow, y.expand(20_000, -1), known, generator=generator)
    assert torch.equal(drawn[:, known], y[known].expand(len(drawn), -1))
    counts = (drawn.unsqueeze(1) == fitting).all(-1).sum(0)
    assert counts.sum() == len(drawn)
    error = (counts / len(drawn) - probs).abs() / (probs * (1 - probs) / len(drawn)).sqrt()
    assert error.max() < 4.5


def test_every_event_may_have_its_own_known_dimensions():
    flow = made()
    masks = torch.tensor([*product([False, True], repeat=4)])
    y = flow.classes.draw((len(masks), 4))
    generator = torch.Generator()
    found = complete(flow, y.where(masks, -1), masks, generator=generator.manual_seed(1))
    assert torch.equal(found[masks], y[masks])
    assert flow.classes.contains(found).all()
    noise = flow.base.noise(len(masks), 4, generator.manual_seed(1))
    for row, (mask, own) in enumerate(zip(masks, found, strict=True)):
        alone = flow.base.complete(y[[row]], mask[None], None, noise[[row]])[0]
        assert torch.equal(alone, own)
    scores = log_prob_given(flow, y.view(2, 8, 4), masks.view(2, 8, 4))
    torch.testing.assert_close(scores[0, 0].sum(), flow.log_prob(y[0]).detach())
    assert not scores[1, -1].any()


def test_no_event_and_no_unknown_value_are_events_too():
    flow = made().double()
    none = torch.zeros(0, 4, dtype=torch.long)
    known = torch.tensor([True, False, True, False])
    assert complete(flow, none, known).shape == log_prob_given(flow, none, known).shape == (0, 4)
    y = flow.classes.draw((3, 4))
    scores = log_prob_given(flow, y, torch.ones(4, dtype=torch.bool))
    assert not scores.any()
    assert scores.dtype == torch.float64


def test_the_likeliest_values_are_taken_one_after_the_other():
    flow = made()
    y, known = torch.tensor([0, 3, 0, 0]), torch.tensor([False, True, False, False])
    found = complete(flow, y, known, greedy=True)
    assert torch.equal(complete(flow, y, known, greedy=True), found)
    visible = known[None].clone()
    for dimension in (0, 2, 3):
        logits = flow.base.conditioner.visible_logits(found[None], visible)[0, dimension]
        assert logits.argmax() == found[dimension]
        visible[0, dimension] = True


def test_it_may_depend_on_a_context():
    flow = made(context=Context(3))
    context = torch.randn(5, 3)
    y = flow.classes.draw((5, 4))
    known = torch.tensor([True, False, True, False])
    assert complete(flow, y, known, context).shape == (5, 4)
    scores = log_prob_given(flow, y, known, context)
    assert not torch.allclose(scores, log_prob_given(flow, y, known, context.flip(0)))
    with pytest.raises(UserError, match="the flow is conditional, and no context was given"):
        complete(flow, y, known)


def test_it_learns_conditionals_in_all_directions():
    torch.manual_seed(0)
    flow = flows.any_order((2, 2, 3), 3, lambda: Transformer(16, layers=1, attention="full"))
    table = torch.tensor([[[8, 1, 1], [1, 1, 4]], [[1, 6, 1], [2, 2, 5]]], dtype=torch.double)
    table /= table.sum()
    optimizer = torch.optim.Adam(flow.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 600)
    cells = torch.tensor([*product(range(2), range(2), range(3))])
    for _ in range(600):
        y = cells[table.flatten().multinomial(512, replacement=True)]
        optimizer.zero_grad()
        (-RandomOrderings()(flow, y).mean()).backward()
        optimizer.step()
        schedule.step()
    flow.eval()
    for order in permutations(range(3)):
        with torch.no_grad():
            log_prob = flow.with_ordering(Permutation(order)).log_prob(cells).double()
        divergence = (table.flatten() * (table.flatten().log() - log_prob)).sum()
        assert 0 < divergence < 0.01
    known = torch.tensor([False, True, True])
    for value, last in product(range(2), range(3)):
        y = torch.tensor([[0, value, last], [1, value, last]])
        found = log_prob_given(flow, y, known).sum(-1).exp().double()
        expected = table[:, value, last] / table[:, value, last].sum()
        assert (found - expected).abs().max() < 0.06


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: flows.any_order(3, 4, lambda: LSTM(WIDTH)),
            "a LSTM keeps to one ordering by itself: choose a backbone that sees all dimensions",
        ),
        (
            lambda: AnyOrderBase(Conditioner(3, 4, Natural(), BACKBONES["masked"]())),
            "an AnyOrderBase needs a network for all orderings",
        ),
        (
            lambda: Conditioner(
                3, 4, Natural(), BACKBONES["masked"](), expert=NGramExpert(3, 2), any_order=True
            ),
            "an expert knows one ordering",
        ),
        (
            lambda: flows.language_model(3, 4).with_ordering(Reversed()),
            "a AutoregressiveBase has one ordering",
        ),
        (
            lambda: made().with_ordering(BehindContext(Natural())),
            "has no dimension of level 0, where a base starts",
        ),
        (
            lambda: LanguageModel(made()),
            "a LanguageModel trains one ordering, and the flow serves all",
        ),
        (
            lambda: flows.bipartite(3, 4).with_ordering(Reversed()),
            "another ordering was asked for, and a base is fitted",
        ),
        (
            lambda: RandomOrderings().prepare(flows.language_model(3, 4)),
            "RandomOrderings trains a base that serves all orderings",
        ),
        (
            lambda: complete(flows.bipartite(3, 4), torch.zeros(4).long(), torch.ones(4).bool()),
            "values given others were asked for, and transforms mix dimensions",
        ),
        (
            lambda: complete(
                flows.language_model(3, 4), torch.zeros(4).long(), torch.ones(4).bool()
            ),
            "a AutoregressiveBase has one ordering, and is conditioned on what this takes first",
        ),
        (
            lambda: complete(made(), torch.zeros(2, 4).long(), torch.ones(3).bool()),
            r"known is torch.bool of shape \(3,\): give a boolean for every value, \(2, 4\)",
        ),
        (
            lambda: complete(made(), torch.zeros(4).long(), torch.ones(4)),
            "known is torch.float32",
        ),
        (
            lambda: log_prob_given(made(), torch.full((4,), 2), torch.ones(4).bool()),
            "a value of 2 at dimension 0 lies outside 0..1",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
