from functools import partial
from math import log

import pytest
import torch
from torch import nn

from dflows import flows
from dflows.backbones import Transformer
from dflows.backbones.attention import Locality
from dflows.backbones.rotary import rotary_table, rotate
from dflows.checks import check_autoregressive, check_flow
from dflows.errors import UserError
from dflows.objectives import SampledPasses
from dflows.orderings import CoarseToFine, Halves, Natural, Reversed, Strided
from tests.dflows.small import shaken, states

WIDTH, HEADS = 8, 2


def example(levels, batch=2):
    content = torch.randn(batch, len(levels), WIDTH, dtype=torch.float64)
    return content, torch.randn(len(levels), WIDTH, dtype=torch.float64), levels


def plain(backbone, content, query, levels):
    """The causal network of one example written with loops over dimensions and heads."""
    size = WIDTH // HEADS
    rotary = None
    if backbone.positions == "lanes":
        query = query + backbone.lanes(levels)
    if backbone.positions in ("rotary", "lanes"):
        rotary = rotary_table(torch.arange(len(levels) + 1), size, content.dtype)
    rows = [backbone.start, *query]
    told = [torch.zeros_like(backbone.start), *content]
    known = [-2, *levels.tolist()]
    places = getattr(backbone, "position", [])
    for n, block in enumerate(backbone.blocks):
        if n < len(places):
            rows = [rows[0], *(h + place for h, place in zip(rows[1:], places[n], strict=False))]
        memory = [block.content_norm(h + block.content(y)) for h, y in zip(rows, told, strict=True)]
        updated = []
        for d, h in enumerate(rows):
            seen = [e for e in range(len(rows)) if known[e] < known[d] or d == e == 0]
            asked = block.query(block.norm(h)).view(HEADS, size)
            parts = []
            for head in range(HEADS):
                scores, values = [], []
                for e in seen:
                    both = block.key_value(memory[e]).view(2, HEADS, size)[:, head]
                    key, ask = both[0], asked[head]
                    if rotary is not None:
                        key = rotate(key.view(1, 1, 1, -1), rotary[:, e : e + 1]).flatten()
                        ask = rotate(ask.view(1, 1, 1, -1), rotary[:, d : d + 1]).flatten()
                    score = key @ ask / size**0.5
                    if block.locality is not None and d > 0 and e > 0 and known[e] >= 0:
                        score = score + block.locality.bias[head, block.locality.length - 1 + e - d]
                    scores.append(score)
                    values.append(both[1])
                parts.append(torch.stack(scores).softmax(0) @ torch.stack(values))
            h = h + block.merge(torch.cat(parts))
            hidden = nn.functional.gelu(block.expand(block.feedforward_norm(h)))
            updated.append(h + block.contract(hidden))
        rows = updated
    return backbone.norm(torch.stack(rows[1:]))


@pytest.mark.parametrize("positions", ["rotary", "learned", "layers", "none"])
@pytest.mark.parametrize("locality", [None, "distance"])
@pytest.mark.parametrize(
    "levels", [[0], [0, 1, 2, 3], [3, 1, 0, 2], [0, 1, 0, 1, 2], [-1, -1, 0, 1, 1]]
)
def test_causal_equals_loops(positions, locality, levels):
    backbone = Transformer(
        WIDTH, 2, HEADS, positions=positions, length=6, locality=locality
    ).double()
    content, query, levels = example(torch.tensor(levels))
    features = backbone(content, query, levels)
    for n in range(2):
        torch.testing.assert_close(features[n], plain(backbone, content[n], query, levels))


@pytest.mark.parametrize("levels", [[0, 1, 2, 0, 1], [2, 1, 0], [-1, -1, 0, 1, 0]])
def test_over_lanes_it_equals_loops(levels):
    backbone = Transformer(WIDTH, 2, HEADS, positions="lanes").double()
    content, query, levels = example(torch.tensor(levels))
    expected = torch.stack([plain(backbone, one, query, levels) for one in content])
    torch.testing.assert_close(backbone(content, query, levels), expected)


def test_one_network_over_lanes_serves_every_number_of_levels():
    torch.manual_seed(0)
    backbone = Transformer(WIDTH, 2, HEADS, positions="lanes").double()
    assert backbone.knows_levels
    assert not Transformer(WIDTH, heads=HEADS).knows_levels
    content, query, _ = example(torch.arange(12))
    query = torch.zeros_like(query)
    seen = []
    for columns in range(1, 13):
        levels = Strided(columns).levels(12)
        whole = backbone(content, query, levels)
        cache = backbone.begin(query, levels, 2)
        for level in range(columns):
            before = content[:, levels == level - 1] if level else None
            features = backbone.advance(cache, level, before)
            torch.testing.assert_close(features, whole[:, levels == level], rtol=0, atol=1e-10)
        seen.append(whole[:, 1:])
    assert all(not torch.allclose(one, seen[-1]) for one in seen[:-1])


@pytest.mark.parametrize("passes", range(1, 7))
def test_events_over_lanes_are_certified_and_add_up_to_one(passes):
    backbone = partial(Transformer, WIDTH, 2, HEADS, positions="lanes")
    flow = shaken(flows.language_model(3, 6, backbone, ordering=Strided(3))).double().eval()
    flow = flow.with_passes(passes)
    check_flow(flow)
    check_autoregressive(backbone(), ordering=Strided(passes))
    y = states(3, 6)
    torch.testing.assert_close(flow.log_prob(y).exp().sum(), torch.tensor(1.0).double())
    # By enumeration: what a dimension is given does not depend on those of no lower level.
    levels = Strided(passes).levels(6)
    terms = flow.base.log_prob(y).view(*[3] * 6, 6)
    for d in range(6):
        ones = [0 if levels[e] >= levels[d] and e != d else slice(None) for e in range(6)]
        first = terms[(*ones, d)]
        for e in range(6):
            if levels[e] >= levels[d] and e != d:
                for value in range(3):
                    other = [*ones]
                    other[e] = value
                    torch.testing.assert_close(terms[(*other, d)], first, rtol=0, atol=1e-12)
    longer = flow.with_length(13).with_passes(passes)
    assert longer.sample((2,)).shape == (2, 13)
    assert longer.passes == passes


def test_one_network_over_lanes_is_trained_for_several_numbers_of_passes():
    backbone = partial(Transformer, WIDTH, 1, HEADS, positions="lanes")
    flow = flows.language_model(3, 8, backbone, ordering=Strided(4))
    objective = SampledPasses([2, 4, 8])
    objective.prepare(flow)
    # The first of a lane is one of three, and tells all others.
    y = (torch.arange(8) + torch.arange(3).unsqueeze(-1)).remainder(3)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (-objective(flow, y).mean()).backward()
        optimizer.step()
    for passes in objective.choices:
        bound = -8 / passes * log(3)
        assert bound - 0.5 < flow.with_passes(passes).log_prob(y).mean() < bound + 1e-3


@pytest.mark.parametrize(
    "levels", [CoarseToFine(4).levels(5), Halves().levels(4), torch.tensor([1, 2, 3])], ids=str
)
def test_without_lanes_the_way_out_is_told(levels):
    backbone = Transformer(WIDTH, heads=HEADS, positions="lanes").double()
    message = r"Natural, Reversed and Strided, not the levels .* or set positions='rotary'"
    content, query, levels = example(levels)
    with pytest.raises(UserError, match=message):
        backbone(content, query, levels)
    with pytest.raises(UserError, match=message):
        backbone.begin(query, levels, 2)


@pytest.mark.parametrize("length", [1, 5])
def test_full_equals_the_encoder_of_pytorch(length):
    backbone = Transformer(WIDTH, 2, HEADS, attention="full", positions="none").double()
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, 2, backbone.norm, enable_nested_tensor=False).double()
    with torch.no_grad():
        for block, other in zip(backbone.blocks, encoder.layers, strict=True):
            for parameter in block.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            attention = other.self_attn
            attention.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
            attention.in_proj_bias.copy_(torch.cat([block.query.bias, block.key_value.bias]))
            attention.out_proj.load_state_dict(block.merge.state_dict())
            other.linear1.load_state_dict(block.expand.state_dict())
            other.linear2.load_state_dict(block.contract.state_dict())
            other.norm1.load_state_dict(block.norm.state_dict())
            other.norm2.load_state_dict(block.feedforward_norm.state_dict())
    features = torch.randn(3, length, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(backbone(features), encoder(features))


def test_full_sees_everything():
    backbone = Transformer(WIDTH, 1, HEADS, attention="full").double()
    features = torch.randn(1, 6, WIDTH, dtype=torch.float64, requires_grad=True)
    (backbone(features)[0, 3] @ torch.randn(WIDTH).double()).backward()
    assert (features.grad[0].abs().amax(dim=-1) > 0).all()


def test_rotated_products_depend_on_the_distance_only():
    rotary = rotary_table(torch.arange(20), 6, torch.float64)
    a, b = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64)
    turned = rotate(a.expand(1, 20, 1, 6), rotary), rotate(b.expand(1, 20, 1, 6), rotary)
    products = torch.einsum("bqhf,bkhf->qk", *turned)
    for offset in range(-19, 20):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(products[0, 0], (a * b).sum())
    assert products[0].std() > 0


@pytest.mark.parametrize("positions", ["rotary", "learned", "layers"])
def test_positions_tell_dimensions_apart(positions):
    levels = torch.tensor([0, 0, 1])
    content = torch.randn(1, 3, WIDTH)
    query = torch.randn(1, WIDTH).expand(3, WIDTH)
    backbone = Transformer(WIDTH, 2, HEADS, positions=positions, length=3)
    known = backbone(content, query, levels)[:, 2]
    assert not torch.allclose(backbone(content[:, [1, 0, 2]], query, levels)[:, 2], known)
    backbone = Transformer(WIDTH, 2, HEADS, positions="none")
    known = backbone(content, query, levels)[:, 2]
    torch.testing.assert_close(backbone(content[:, [1, 0, 2]], query, levels)[:, 2], known)


def test_locality_starts_at_minus_slope_times_distance():
    bias = Locality(heads=4, length=6)(length=5)
    assert bias.shape == (4, 5, 5)
    slopes = 0.03 ** torch.linspace(0, 1, 4)
    for query in range(5):
        for key in range(5):
            torch.testing.assert_close(bias[:, query, key], -slopes * abs(query - key))


def test_locality_has_entries_of_their_own_for_left_and_right():
    locality = Locality(heads=1, length=4)
    with torch.no_grad():
        locality.bias.copy_(torch.arange(7.0))
    assert locality(length=3)[0].tolist() == [[3, 4, 5], [2, 3, 4], [1, 2, 3]]


@pytest.mark.parametrize("attention", ["causal", "full"])
@pytest.mark.parametrize("locality", [None, "distance"])
def test_64_layers_start_with_features_and_gradients_of_order_one(attention, locality):
    backbone = Transformer(32, 64, 4, attention=attention, locality=locality, length=12)
    content, query = torch.randn(2, 12, 32, requires_grad=True), torch.randn(12, 32)
    features = backbone(content, query, Natural().levels(12))
    (features * torch.randn_like(features)).sum().backward()
    assert 0.5 < features.std() < 2
    assert 1e-2 < content.grad.std() < 20
    first, last = backbone.blocks[0].expand.weight.grad, backbone.blocks[-1].expand.weight.grad
    assert 0.05 < first.norm() / last.norm() < 20


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_positions_are_added_once_or_at_every_layer(attention):
    for positions, number in (("learned", 1), ("layers", 3)):
        backbone = Transformer(
            WIDTH, 3, HEADS, attention=attention, positions=positions, length=5
        ).double()
        assert backbone.position.shape == (number, 5, WIDTH)
        features = backbone(*example(torch.arange(4)))
        (features * torch.randn_like(features)).sum().backward()  # their sum is always the same
        assert backbone.position.grad[:, :4].abs().amin(dim=(1, 2)).gt(0).all()
        with pytest.raises(UserError, match="made for length=5"):
            backbone(*example(torch.arange(6)))


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_the_layers_can_be_looked_at(attention):
    backbone = Transformer(WIDTH, 3, HEADS, attention=attention).double()
    content, query, levels = example(torch.tensor([0, 1, 1, 2]))
    given = (content, query, levels) if attention == "causal" else (content,)
    assert backbone.num_layers == 3
    features = backbone.layer_features(*given)
    assert [one.shape for one in features] == [(2, 4, WIDTH)] * 3
    torch.testing.assert_close(features[-1], backbone(*given))
    backbone.blocks = backbone.blocks[:2]
    torch.testing.assert_close(backbone.norm(features[1]), backbone(*given))


@pytest.mark.parametrize("positions", ["rotary", "learned", "layers"])
@pytest.mark.parametrize("ordering", [Natural(), Reversed(), Strided(3), CoarseToFine(4)])
def test_one_network_serves_every_ordering_by_steps_too(ordering, positions):
    backbone = Transformer(
        WIDTH, 2, HEADS, positions=positions, locality="distance", length=20
    ).double()
    content, query, levels = example(ordering.levels(11))
    whole = backbone(content, query, levels)
    cache = backbone.begin(query, levels, 2)
    for level in range(int(levels.max()) + 1):
        before = content[:, levels == level - 1] if level else None
        features = backbone.advance(cache, level, before)
        torch.testing.assert_close(features, whole[:, levels == level], rtol=0, atol=1e-10)


def test_context_is_visible_to_all_and_sees_nothing():
    backbone = Transformer(WIDTH, 2, HEADS).double()
    content, query, levels = example(torch.tensor([-1, -1, 0, 1]))
    content.requires_grad_()
    features = backbone(content, query, levels)
    (grad,) = torch.autograd.grad(features[:, 2].square().sum(), content, retain_graph=True)
    assert (grad.abs().amax(dim=(0, 2)) > 0).tolist() == [True, True, False, False]
    (grad,) = torch.autograd.grad(features[:, :2].square().sum(), content)
    assert not grad.any()


def test_dropout_reaches_attention_and_updates():
    backbone = Transformer(WIDTH, 1, HEADS, dropout=0.5)
    assert backbone.blocks[0].attention_dropout == 0.5
    content, query, levels = example(torch.arange(4))
    content, query = content.float(), query.float()
    assert not torch.equal(backbone(content, query, levels), backbone(content, query, levels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3}, "width=8 does not divide into heads=3"),
        ({"heads": 8}, "a head has 1"),
        ({"attention": "both"}, "attention is 'both'"),
        ({"positions": "sinus"}, "positions is 'sinus'"),
        ({"positions": "lanes", "attention": "full"}, "has no lanes: set attention='causal'"),
        ({"positions": "lanes", "heads": 8}, "a head has 1"),
        ({"locality": "window"}, "locality is 'window'"),
        ({"positions": "learned"}, "give `length`"),
        ({"locality": "distance"}, "give `length`"),
        ({"length": 0}, "length is 0"),
        ({"dropout": 1}, "dropout is 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Transformer(WIDTH, **arguments)
