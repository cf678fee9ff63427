"""What all objectives promise: a value an example, gradients for all, the training's progress."""

import copy
import pickle

import pytest
import torch

from dflows import Context, DiscreteFlow, FactorizedBase
from dflows.backbones import LSTM
from dflows.bases import AutoregressiveBase
from dflows.errors import NonFiniteError, UserError
from dflows.gradients import (
    GumbelStraightThrough,
    PosteriorRule,
    ReinMax,
    SoftmaxStraightThrough,
)
from dflows.orderings import Natural, Parity, Strided
from tests.dflows.objectives.references import STAGES
from tests.dflows.small import (
    BIJECTIONS,
    BOTH_PARITIES,
    OBJECTIVES,
    assert_gradients_close,
    gradients,
    make_conditioner,
    make_flow,
    make_transform,
    prepared,
    shaken,
    states,
)

# Those whose value is the exact log-probability, and not an estimate.
EXACT = ["end-to-end", "local", "layerwise", "local-expectation", "one-after-another"]
every = pytest.mark.parametrize("name", OBJECTIVES)


def base_of(kind, num_classes, length, backbone="causal"):
    if kind == "factorized":
        return None
    return AutoregressiveBase(make_conditioner(num_classes, length, Natural(), backbone))


@every
@pytest.mark.parametrize("bijection", BIJECTIONS)
@pytest.mark.parametrize("base", ["factorized", "autoregressive"])
def test_every_parameter_of_a_stack_receives_a_gradient(name, bijection, base):
    flow = make_flow(5, 6, [*BOTH_PARITIES, Natural()], bijection, base=base_of(base, 5, 6))
    objective = prepared(name, flow)
    parameters = dict(flow.named_parameters()) | dict(objective.named_parameters())
    for progress in STAGES[::2] if name.startswith(("l", "one")) else [0.0]:
        y = torch.randint(5, (64, 6))
        (-objective(flow, y, progress=progress).mean()).backward()
        for key, parameter in parameters.items():  # distributed training awaits them all
            assert parameter.grad is not None, (progress, key)
    for key, parameter in parameters.items():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@every
@pytest.mark.parametrize("progress", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("backbone", ["causal", "masked"])
def test_a_single_example_leaves_no_parameter_without_a_gradient(name, progress, backbone):
    flow = make_flow(3, 4, [Strided(columns=3), Natural()], "affine", backbone)
    objective = prepared(name, flow)
    for seed in range(2):
        torch.manual_seed(seed)
        objective(flow, torch.randint(3, (1, 4)), progress=progress).sum().backward()
        for module in (flow, objective):
            expected = {key for key, _ in module.named_parameters()}
            assert gradients(module).keys() == expected


@every
@pytest.mark.parametrize("bijection", BIJECTIONS)
@pytest.mark.parametrize(
    ("backbone", "base"), [("causal", "autoregressive"), ("masked", "factorized")]
)
def test_values_are_log_probabilities_or_estimates_of_them(name, bijection, backbone, base):
    flow = make_flow(
        3, 4, [Parity(), Strided(columns=3)], bijection, backbone, base=base_of(base, 3, 4)
    )
    objective, y = prepared(name, flow), states(3, 4)[::5]
    exact = flow.log_prob(y)
    for progress in (0.0, 0.3, 0.6, 0.9):
        value = objective(flow, y, progress=progress)
        assert value.shape == (len(y),)
        assert value.requires_grad
        if name in EXACT:
            torch.testing.assert_close(value, exact)
        else:
            assert value.isfinite().all()


@every
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
def test_batch_dimensions_are_kept(name, shape):
    flow = make_flow(4, 5, [Natural(), Parity(first=1)], backbone="causal")
    objective, y = prepared(name, flow), torch.randint(4, (*shape, 5))
    value = objective(flow, y, progress=0.3)
    assert value.shape == shape
    if name in EXACT:
        torch.testing.assert_close(value, flow.log_prob(y))
    assert torch.equal(objective(flow, y.int(), progress=0.3).isfinite(), value.isfinite())


@every
@pytest.mark.parametrize("shape", [(3, 2), (3, 4, 2)])
@pytest.mark.parametrize("backbone", ["causal", "masked"])
def test_a_context_goes_to_all_parts(name, shape, backbone):
    base = AutoregressiveBase(make_conditioner(4, 4, Parity(), "causal", context=Context(2)))
    flow = make_flow(4, 4, [Natural(), Parity()], "rank", backbone, base=base, context=Context(2))
    objective, y, context = prepared(name, flow), torch.randint(4, (20, 3, 4)), torch.randn(shape)
    for progress in (0.2, 0.4, 0.6, 0.8):
        value = objective(flow, y, context, progress)
        assert value.shape == (20, 3)
        if name in EXACT:
            torch.testing.assert_close(value, flow.log_prob(y, context))
        value.sum().backward()
        with pytest.raises(UserError, match="no context was given"):
            objective(flow, y, progress=progress)
    for part in (flow.base, *flow.transforms):
        assert part.conditioner.embedding.context.weight.grad.any()


@every
def test_an_encoder_of_contexts_is_trained_along(name):
    encoder = torch.nn.Linear(3, 2)
    flow = make_flow(4, 4, encoder=encoder, context=Context(2))
    objective = prepared(name, flow)
    objective(flow, torch.randint(4, (6, 4)), torch.randn(6, 3), progress=0.9).sum().backward()
    assert encoder.weight.grad.any()


@every
def test_what_is_no_event_or_takes_no_context_is_refused(name):
    flow = make_flow()
    objective = prepared(name, flow)
    for y, message in (
        (torch.zeros(2, 4), "dtype torch.float32"),
        (torch.zeros(2, 5, dtype=torch.long), "5 dimensions.*the flow has 4"),
        (torch.tensor([[0, 1, 3, 0]]), "value of 3 lies outside 0..2"),
    ):
        with pytest.raises(UserError, match=message):
            objective(flow, y, progress=0.5)
    with pytest.raises(UserError, match="flow that takes none"):
        objective(flow, torch.zeros(2, 4, dtype=torch.long), torch.randn(2, 5), 0.5)


@every
def test_float64_is_kept(name):
    flow = make_flow().double()
    objective = prepared(name, flow)
    assert all(parameter.dtype == torch.float64 for parameter in objective.parameters())
    y = torch.randint(3, (5, 4))
    assert objective(flow, y, progress=0.6).dtype == torch.float64


@every
@pytest.mark.parametrize("backbone", ["causal", "masked"])
def test_autocast_gives_finite_gradients(name, backbone):
    flow = make_flow(5, 4, backbone=backbone)
    objective = prepared(name, flow)
    with torch.autocast("cpu", torch.bfloat16):
        for progress in (0.2, 0.8):
            loss = -objective(flow, torch.randint(5, (30, 4)), progress=progress).mean()
            loss.backward()
            assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in flow.parameters())


@every
@pytest.mark.parametrize("where", ["transform", "base"])
def test_a_diverged_network_is_an_error(name, where):
    base = AutoregressiveBase(make_conditioner(3, 4, Natural()))
    flow = make_flow(3, 4, [Natural()], "rank", base=base)
    objective, y = prepared(name, flow), torch.randint(3, (20, 4))
    part = flow.base if where == "base" else flow.transforms[0]
    part.conditioner.head.bias.data[1] = torch.nan
    culprit = "AutoregressiveBase" if where == "base" else "RankPermutation"
    with pytest.raises(NonFiniteError, match=culprit):
        objective(flow, y, progress=0.7)


@every
def test_it_says_its_stages_and_whose_parameters_do_not_learn(name):
    flow = make_flow(3, 4, [Natural(), Parity()])
    objective = prepared(name, flow)
    assert objective.num_stages(flow) == {"layerwise": 2, "local-expectation": 4}.get(name, 1)
    known = {id(parameter) for module in (flow, objective) for parameter in module.parameters()}
    for progress in (0.0, 0.4, 1.0):
        frozen = objective.frozen(flow, progress)
        assert {id(parameter) for parameter in frozen} <= known
        y = torch.randint(3, (20, 4))
        objective(flow, y, progress=progress).sum().backward()
        assert all(parameter.grad is not None for parameter in frozen)
        assert not any(parameter.grad.any() for parameter in frozen)
        flow.zero_grad()
        objective.zero_grad()
        assert objective.end_to_end(progress) == (
            name.startswith("end") or (name == "one-after-another" and progress >= 0.5)
        )


@pytest.mark.parametrize("name", ["layerwise", "local-expectation", "one-after-another"])
def test_the_progress_is_needed_where_there_are_stages(name):
    flow = make_flow()
    objective, y = prepared(name, flow), torch.randint(3, (5, 4))
    for call in (
        lambda: objective(flow, y),
        lambda: objective.frozen(flow, None),
        lambda: OBJECTIVES["one-after-another"]().end_to_end(None),
    ):
        with pytest.raises(UserError, match=r"is unknown: call objective\(flow, .*progress=0.0"):
            call()


@pytest.mark.parametrize("name", ["end-to-end", "end-to-end-levels", "local", "local-transforms"])
def test_the_progress_does_not_matter_elsewhere(name):
    flow, y, values = make_flow(), torch.randint(3, (5, 4)), []
    objective = prepared(name, flow)
    for progress in (None, 0.0, 1.0):
        torch.manual_seed(1)
        values.append(objective(flow, y, progress=progress))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


@every
def test_a_flow_without_transforms_is_trained_by_its_base(name):
    y = torch.randint(3, (5, 4))
    for flow in (
        shaken(DiscreteFlow(FactorizedBase(3, 4))),
        shaken(DiscreteFlow(AutoregressiveBase(make_conditioner(3, 4, Natural(), LSTM(8))))),
    ):
        objective = prepared(name, flow)
        value = objective(flow, y, progress=0.5)
        torch.testing.assert_close(value, flow.log_prob(y))
        value.sum().backward()
        assert all(parameter.grad.any() for parameter in flow.parameters())


@every
def test_its_state_can_be_loaded_copied_and_pickled(name):
    flow, y = make_flow(), torch.randint(3, (5, 4))
    objective = prepared(name, flow)
    other = OBJECTIVES[name]()
    other.prepare(flow)
    assert other.state_dict().keys() == objective.state_dict().keys()
    other.load_state_dict(objective.state_dict())
    for same in (other, copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        results = []
        for each in (objective, same):
            torch.manual_seed(1)
            each(flow, y, progress=0.2).sum().backward()
            results.append(gradients(flow) | {f"own.{k}": v for k, v in gradients(each).items()})
        assert_gradients_close(*results)
        assert repr(same) == repr(objective)


@every
def test_preparing_twice_keeps_what_was_learnt(name):
    flow = make_flow()
    objective = prepared(name, flow)
    before = copy.deepcopy(objective.state_dict())
    objective.prepare(flow)
    after = objective.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


LEARNING = [
    ("end-to-end", "shift", SoftmaxStraightThrough(1.0)),
    ("end-to-end", "shift", PosteriorRule()),
    ("end-to-end", "shift", GumbelStraightThrough()),
    ("end-to-end", "shift", ReinMax()),
    ("local", "shift", None),
    ("local", "rank", None),
    ("local-levels", "rank", None),
    ("layerwise", "rank", None),
    ("local-expectation", "rank", None),
    ("one-after-another", "rank", None),
]


@pytest.mark.parametrize(("name", "bijection", "rule"), LEARNING, ids=str)
def test_training_learns_a_dependence(name, bijection, rule):
    # The second character repeats the first: a flow over a factorized base can say so.
    torch.manual_seed(0)
    mapping = BIJECTIONS[bijection](4, rule=copy.deepcopy(rule))
    flow = DiscreteFlow(FactorizedBase(4, 2), [make_transform(4, 2, Parity(), mapping)])
    objective = OBJECTIVES[name]()
    objective.prepare(flow)
    y = torch.arange(4).unsqueeze(-1).expand(-1, 2)
    optimizer = torch.optim.Adam([*flow.parameters(), *objective.parameters()], 0.05)
    for step in range(80):
        optimizer.zero_grad()
        # 20 copies: rules that draw maps see several.
        (-objective(flow, y.repeat(20, 1), progress=step / 80).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        assert -flow.log_prob(y).mean() < torch.tensor(4.0).log() + 0.15
    assert len(flow.residuals(y)[-1][:, 1].unique()) == 1
