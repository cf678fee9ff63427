"""The promises of a backbone, kept by every member of the package."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dflows.backbones import (
    LSTM,
    MADE,
    Backbone,
    DilatedConvolution,
    LevelConvolution,
    Masked,
    StatefulBackbone,
    SteppedBackbone,
    Table,
    Transformer,
)
from dflows.backbones.attention import Block
from dflows.errors import UserError
from dflows.orderings import Natural, Strided

WIDTH, LENGTH, BATCH = 8, 9, 3

CAUSAL: dict[str, Callable[[], Backbone]] = {
    "made": lambda: MADE(WIDTH, length=LENGTH, hidden=40, layers=3),
    "lstm": lambda: LSTM(WIDTH, layers=2, hidden=6),
    "lstm-lanes": lambda: LSTM(WIDTH, layers=2, hidden=6, ahead=2),
    "transformer": lambda: Transformer(WIDTH, layers=3, heads=2),
    "transformer-lanes": lambda: Transformer(WIDTH, heads=2, positions="lanes"),
    "transformer-learned": lambda: Transformer(WIDTH, heads=2, positions="learned", length=LENGTH),
    "transformer-local": lambda: Transformer(
        WIDTH, heads=2, positions="none", length=LENGTH, locality="distance"
    ),
    "level-convolution": lambda: LevelConvolution(WIDTH, layers=2, distances=(1, 3), window=2),
}
OTHERS: dict[str, Callable[[], Backbone]] = {
    "convolution": lambda: DilatedConvolution(WIDTH, layers=3, dilations=[1, [2, 4]], kernel=5),
    "lstm-bidirectional": lambda: LSTM(WIDTH, layers=2, bidirectional=True),
    "transformer-full": lambda: Transformer(WIDTH, heads=2, attention="full"),
    "transformer-full-local": lambda: Transformer(
        WIDTH, heads=4, attention="full", positions="learned", length=LENGTH, locality="distance"
    ),
}
OTHERS["masked"] = lambda: Masked(
    nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)), WIDTH
)
STEPPED = [name for name, make in CAUSAL.items() if isinstance(make(), SteppedBackbone)]
STATEFUL = [name for name, make in CAUSAL.items() if isinstance(make(), StatefulBackbone)]

causal = pytest.mark.parametrize("name", CAUSAL)
every = pytest.mark.parametrize("name", CAUSAL | OTHERS)
stepped = pytest.mark.parametrize("name", STEPPED)
CHECKPOINTING = [name for name, make in (CAUSAL | OTHERS).items() if make().checkpoints_gradients]


def make(name: str) -> Backbone:
    torch.manual_seed(0)
    return (CAUSAL | OTHERS)[name]()


def levels_for(name: str, length: int) -> Tensor:
    return torch.arange(length) if name == "lstm" else torch.arange(length) % 4


def arguments(
    backbone: Backbone, levels: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    content = torch.randn(BATCH, len(levels), WIDTH, dtype=dtype)
    if not backbone.level_causal:
        return (content,)
    query = torch.randn(len(levels), WIDTH, dtype=dtype)
    return content, query * (levels >= 0).unsqueeze(-1), levels


@st.composite
def some_levels(draw: st.DrawFn, name: str) -> Tensor:
    """Levels with ties and any order, behind a context now and then."""
    length = draw(st.integers(1, 6))
    if name == "lstm":
        levels = torch.arange(length)
        levels = levels.flip(0) if draw(st.booleans()) else levels
    elif name.endswith("-lanes"):
        levels = torch.arange(length) % draw(st.integers(1, length))
    else:
        drawn = draw(st.lists(st.integers(0, 5), min_size=length, max_size=length))
        levels = torch.tensor(drawn).unique(return_inverse=True)[1]
    context = draw(st.integers(0, LENGTH - 6))
    return torch.cat([torch.full((context,), -1), levels])


@every
def test_attributes_and_shape(name):
    backbone = make(name)
    assert (backbone.width, backbone.embeds) == (WIDTH, True)
    assert backbone.level_causal == (name in CAUSAL)
    assert backbone.knows_positions == (name != "masked")
    for length in (1, 2, 5, LENGTH):
        features = backbone(*arguments(backbone, levels_for(name, length)))
        assert features.shape == (BATCH, length, WIDTH)
        assert features.isfinite().all()


@every
def test_features_of_some_dimensions_are_those_of_all(name):
    backbone = make(name).double().eval()
    inputs = arguments(backbone, levels_for(name, LENGTH), torch.float64)
    features = backbone(*inputs)
    for dimensions in ([0], [1, 2, 5], [8, 0], range(LENGTH)):
        some = torch.tensor([*dimensions])
        torch.testing.assert_close(backbone.features_at(some, *inputs), features[:, some])


@every
def test_layer_features_end_with_the_features(name):
    backbone = make(name).double().eval()
    inputs = arguments(backbone, levels_for(name, LENGTH), torch.float64)
    features = backbone.layer_features(*inputs)
    assert len(features) == backbone.num_layers
    assert all(one.shape == (BATCH, LENGTH, WIDTH) for one in features)
    torch.testing.assert_close(features[-1], backbone(*inputs))


@causal
@given(data=st.data())
def test_layer_features_keep_to_the_levels(name, data):
    levels = data.draw(some_levels(name))
    backbone = make(name).double().eval()
    content, query, levels = arguments(backbone, levels, torch.float64)
    features = backbone.layer_features(content, query, levels)
    for level in range(int(levels.max()) + 1):
        changed = torch.where((levels < level).unsqueeze(-1), content, 7.0)
        found = backbone.layer_features(changed, query, levels)
        for one, other in zip(features, found, strict=True):
            of_level = levels == level
            torch.testing.assert_close(other[:, of_level], one[:, of_level], rtol=0, atol=1e-12)


@causal
@given(data=st.data())
def test_output_depends_on_content_of_lower_levels_only(name, data):
    levels = data.draw(some_levels(name))
    backbone = make(name).double().eval()
    content, query, levels = arguments(backbone, levels, torch.float64)
    content.requires_grad_()
    features = backbone(content, query, levels)
    for d in range(len(levels)):
        if levels[d] < 0:
            continue
        grad = torch.autograd.grad(
            features[:, d].square().sum(), content, retain_graph=True, allow_unused=True
        )[0]
        grad = torch.zeros_like(content) if grad is None else grad
        seen = grad.abs().amax(dim=(0, 2)) > 0
        assert not seen[levels >= levels[d]].any()

        changed = torch.where((levels < levels[d]).unsqueeze(-1), content, 7.0)
        torch.testing.assert_close(
            backbone(changed, query, levels)[:, d], features[:, d], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("name", sorted(CAUSAL.keys() - {"level-convolution", "lstm-lanes"}))
@given(data=st.data())
def test_output_sees_all_content_of_lower_levels(name, data):
    levels = data.draw(some_levels(name))
    backbone = make(name).double().eval()
    content, query, levels = arguments(backbone, levels, torch.float64)
    features = backbone(content.requires_grad_(), query, levels)
    for d in range(len(levels)):
        lower = (levels < levels[d]) & (levels[d] >= 0)
        if lower.any():
            weights = torch.randn(WIDTH, dtype=torch.float64)
            (grad,) = torch.autograd.grad(
                (features[:, d] @ weights).sum(), content, retain_graph=True
            )
            assert (grad.abs().amax(dim=(0, 2)) > 0)[lower].all()


@causal
def test_query_matters_and_gets_a_gradient(name):
    backbone = make(name)
    content, query, levels = arguments(backbone, levels_for(name, LENGTH))
    backbone(content, query.requires_grad_(), levels).square().sum().backward()
    assert (query.grad.abs().amax(dim=-1) > 0).all()


@every
def test_every_parameter_gets_a_gradient(name):
    backbone = make(name)
    features = backbone(*arguments(backbone, levels_for(name, LENGTH)))
    (features * torch.randn(BATCH, LENGTH, WIDTH)).sum().backward()
    missing = [
        key
        for key, parameter in backbone.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert missing == []


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept(name, dtype):
    backbone = make(name).to(dtype)
    features = backbone(*arguments(backbone, levels_for(name, LENGTH), dtype))
    assert features.dtype == dtype
    features.float().square().mean().backward()


@every
def test_autocast(name):
    backbone = make(name).eval()
    inputs = arguments(backbone, levels_for(name, LENGTH))
    exact = backbone(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = backbone(*inputs)
    torch.testing.assert_close(features.float(), exact, rtol=0.1, atol=0.1)
    features.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in backbone.parameters())


@every
def test_examples_of_a_batch_are_independent(name):
    backbone = make(name).double().eval()
    content, *rest = arguments(backbone, levels_for(name, LENGTH), torch.float64)
    whole = backbone(content, *rest)
    for n in range(BATCH):
        torch.testing.assert_close(backbone(content[n : n + 1], *rest), whole[n : n + 1])


@every
def test_evaluation_is_deterministic_and_dropout_is_not(name):
    backbone = make(name)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    inputs = arguments(backbone, levels_for(name, LENGTH))
    backbone.eval()
    assert torch.equal(backbone(*inputs), backbone(*inputs))
    backbone.train()
    if any(isinstance(module, nn.Dropout) for module in backbone.modules()):
        assert not torch.equal(backbone(*inputs), backbone(*inputs))


@every
def test_state_goes_round_and_holds_parameters_only(name):
    backbone = make(name)
    inputs = arguments(backbone, levels_for(name, LENGTH))
    backbone(*inputs)
    state = backbone.state_dict()
    assert set(state) == {key for key, _ in backbone.named_parameters()}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = (CAUSAL | OTHERS)[name]()
    assert not torch.equal(other(*inputs), backbone(*inputs))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(*inputs), backbone(*inputs))


@every
def test_copy_after_use(name):
    backbone = make(name)
    inputs = arguments(backbone, levels_for(name, LENGTH))
    features = backbone(*inputs)
    assert torch.equal(copy.deepcopy(backbone)(*inputs), features)


@every
def test_use_under_inference_mode_leaves_training_possible(name):
    backbone = make(name)
    with torch.inference_mode():
        backbone(*arguments(backbone, levels_for(name, LENGTH)))
    backbone(*arguments(backbone, levels_for(name, LENGTH))).sum().backward()


@every
def test_repr(name):
    backbone = make(name)
    assert repr(backbone).startswith(f"{type(backbone).__name__}(\n  width={WIDTH}")


@every
def test_wrong_shapes_are_refused(name):
    backbone = make(name)
    content, *rest = arguments(backbone, levels_for(name, LENGTH))
    with pytest.raises(UserError, match=r"width=8.*was given \(3, 9, 7\)"):
        backbone(content[..., :7], *rest)
    with pytest.raises(UserError, match=r"was given \(9, 8\)"):
        backbone(content[0], *rest)
    if backbone.level_causal:
        query, levels = rest
        with pytest.raises(UserError, match="content, query and levels"):
            backbone(content)
        with pytest.raises(UserError, match=r"the query must be \(9, 8\)"):
            backbone(content, query[1:], levels)
        with pytest.raises(UserError, match=r"levels \(9,\)"):
            backbone(content, query, levels[1:])


@pytest.mark.parametrize(
    "name", ["made", "transformer-learned", "transformer-local", "transformer-full-local"]
)
def test_more_dimensions_than_parameters_are_refused(name):
    backbone = make(name)
    with pytest.raises(UserError, match="length=9 and was given 10 dimensions"):
        backbone(*arguments(backbone, levels_for(name, LENGTH + 1)))


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: MADE(0, length=3), "width is 0: give at least 1"),
        (lambda: MADE(4, length=0), "length is 0"),
        (lambda: LSTM(4, layers=0), "layers is 0"),
        (lambda: LSTM(4, hidden=0), "hidden is 0"),
        (lambda: LSTM(4, dropout=1.0), "dropout is 1.0"),
        (lambda: DilatedConvolution(4, dropout=-0.1), "dropout is -0.1"),
        (lambda: Transformer(4, layers=0), "layers is 0"),
    ],
)
def test_bad_sizes_are_refused(create, message):
    with pytest.raises(UserError, match=message):
        create()


@stepped
@given(data=st.data())
def test_steps_equal_one_pass(name, data):
    levels = data.draw(some_levels(name))
    backbone = make(name).double().eval()
    content, query, levels = arguments(backbone, levels, torch.float64)
    whole = backbone(content, query, levels)
    assert backbone.steps
    cache = backbone.begin(query, levels, BATCH)
    for level in range(int(levels.max()) + 1):
        before = levels == level - 1
        given_content = content[:, before] if before.any() else None
        features = backbone.advance(cache, level, given_content)
        assert not features.requires_grad
        torch.testing.assert_close(features, whole[:, levels == level], rtol=0, atol=1e-10)
    with pytest.raises(UserError, match="there are"):
        backbone.advance(cache, level + 1, content[:, levels == level])


@stepped
def test_steps_under_autocast(name):
    backbone = make(name).eval()
    content, query, levels = arguments(backbone, torch.arange(LENGTH))
    whole = backbone(content, query, levels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = backbone.begin(query, levels, BATCH)
        for level in range(LENGTH):
            before = content[:, level - 1 : level] if level else None
            features = backbone.advance(cache, level, before)
            torch.testing.assert_close(
                features.float(), whole[:, level : level + 1], rtol=0.1, atol=0.1
            )


@pytest.mark.parametrize("name", STATEFUL)
def test_windows_that_go_on_are_one_sequence(name):
    backbone = make(name).double().eval()
    assert backbone.stateful
    content, query, levels = arguments(backbone, torch.arange(LENGTH), torch.float64)
    whole = backbone(content, query, levels)
    before, state = backbone.start.expand(BATCH, WIDTH), None
    for part in (slice(0, 4), slice(4, 5), slice(5, LENGTH)):
        levels = torch.arange(part.stop - part.start)
        features, state = backbone.resume(content[:, part], query[part], levels, before, state)
        torch.testing.assert_close(features, whole[:, part])
        before = content[:, part.stop - 1]
    # A window begins anew where its state is zero.
    anew = torch.tensor([True, False, True]).unsqueeze(-1)
    state = tuple(one.masked_fill(anew, 0) for one in state)
    before = torch.where(anew, backbone.start, before)
    features, _ = backbone.resume(content, query, torch.arange(LENGTH), before, state)
    torch.testing.assert_close(features[anew.squeeze(-1)], whole[anew.squeeze(-1)])
    assert not torch.allclose(features[1], whole[1])


@stepped
def test_steps_out_of_turn_are_refused(name):
    backbone = make(name)
    content, query, levels = arguments(backbone, torch.arange(3))
    cache = backbone.begin(query, levels, BATCH)
    with pytest.raises(UserError, match="level 1 was asked for, and level 0 is next"):
        backbone.advance(cache, 1, content[:, :1])
    backbone.advance(cache, 0, None)
    with pytest.raises(UserError, match="level 0 was asked for, and level 1 is next"):
        backbone.advance(cache, 0, None)
    with pytest.raises(UserError, match=r"content \(3, 1, 8\) of level 0 .* given \(3, 2, 8\)"):
        backbone.advance(cache, 1, content[:, :2])
    with pytest.raises(UserError, match=r"level 0 and was given \(3, 0, 8\)"):
        backbone.advance(cache, 1, None)


@pytest.mark.parametrize(
    "backbone",
    [Transformer(WIDTH, heads=2, attention="full"), LSTM(WIDTH, bidirectional=True)],
    ids=["transformer", "lstm"],
)
def test_a_backbone_that_sees_everything_has_no_steps(backbone):
    assert not backbone.steps
    with pytest.raises(UserError, match="has no steps: set"):
        backbone.begin(torch.zeros(3, WIDTH), torch.arange(3), BATCH)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["transformer", "transformer-local", "transformer-full", "convolution", "made"]
)
def test_compiles_without_a_break(name):
    backbone = make(name)
    inputs = arguments(backbone, levels_for(name, LENGTH))
    compiled = torch.compile(backbone, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), backbone(*inputs), rtol=1e-4, atol=1e-5)
    compiled(*inputs).sum().backward()


def test_the_contract_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Backbone(4, level_causal=True)
    with pytest.raises(TypeError, match="abstract"):
        SteppedBackbone(4, level_causal=True)
    with pytest.raises(TypeError, match="abstract"):
        StatefulBackbone(4, level_causal=True)


def test_table_takes_values_where_others_take_features():
    table = Table(WIDTH, num_classes=2, length=3, ordering=Natural())
    assert (table.embeds, table.level_causal, table.width) == (False, True, WIDTH)
    assert not Table.embeds
    assert isinstance(table, Backbone)
    assert not isinstance(table, SteppedBackbone)
    levels = Strided(columns=2).levels(3)
    with pytest.raises(UserError, match="make one for each ordering"):
        table(torch.zeros(1, 3, dtype=torch.long), levels=levels)


def step_of(name: str, checkpointing: bool, half: bool) -> tuple[list[Tensor], int]:
    """The gradients of a training step that drops features, and the bytes kept for it."""
    backbone = make(name).train()
    for part in backbone.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.3
        if isinstance(part, Block):
            part.attention_dropout = 0.3
    backbone.gradient_checkpointing = checkpointing
    inputs = [part.requires_grad_(part.is_floating_point()) for part in arguments(backbone, LEVELS)]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        loss = backbone(*inputs).square().sum()
    loss.backward()
    learned = [*inputs, *backbone.parameters()]
    # What goes into a layer that is computed again is kept beside what autograd saves.
    layers = next(part for part in backbone.children() if isinstance(part, nn.ModuleList))
    again = len(layers) * inputs[0].nbytes if checkpointing else 0
    return [part.grad for part in learned if part.grad is not None], sum(kept.values()) + again


LEVELS = torch.arange(LENGTH) % 4


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTING)
def test_layers_that_are_computed_twice_have_the_same_gradients_in_less_memory(name, half):
    (plain, all_of_it), (again, less) = (step_of(name, again, half) for again in (False, True))
    assert len(plain) == len(again) > 8
    assert all(torch.equal(first, second) for first, second in zip(plain, again, strict=True))
    assert less < all_of_it / 2


def test_who_computes_layers_twice():
    stacks = {"convolution", "level-convolution"}
    assert set(CHECKPOINTING) == {
        name for name in CAUSAL | OTHERS if name in stacks or name.startswith("transformer")
    }
