import pytest
import torch
from torch import nn

from dflows.backbones import LSTM
from dflows.errors import UserError
from dflows.orderings import Natural, Parity, Permutation, Reversed, Strided

WIDTH = 6


def by_cells(backbone, rows):
    """The features after a sequence of inputs (B, width), by the cells of PyTorch."""
    cells = []
    for layer, weights in enumerate(backbone.lstm.all_weights):
        cell = nn.LSTMCell(WIDTH if layer == 0 else backbone.lstm.hidden_size, weights[1].shape[1])
        cell.double().load_state_dict(dict(zip(cell.state_dict(), weights, strict=True)))
        cells.append(cell)
    states = [None] * len(cells)
    for x in rows:
        for layer, cell in enumerate(cells):
            states[layer] = cell(x, states[layer])
            x = states[layer][0]
    return backbone.linear(x)


@pytest.mark.parametrize("ordering", [Natural(), Reversed()])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize(("layers", "hidden"), [(1, None), (2, 5)])
def test_causal_equals_cells(ordering, context, layers, hidden):
    backbone = LSTM(WIDTH, layers, hidden=hidden).double()
    levels = torch.cat([torch.full((context,), -1), ordering.levels(4)])
    content = torch.randn(2, len(levels), WIDTH, dtype=torch.float64)
    query = torch.randn(len(levels), WIDTH, dtype=torch.float64)
    features = backbone(content, query, levels)
    order = [*range(context), *(context + ordering.levels(4).argsort()).tolist()]
    inputs, before = [], backbone.start
    for d in order:
        inputs.append((before + query[d]).expand(2, WIDTH))
        before = content[:, d]
        torch.testing.assert_close(features[:, d], by_cells(backbone, inputs))


def test_bidirectional_sees_everything_and_takes_features_only():
    backbone = LSTM(WIDTH, bidirectional=True, hidden=4).double()
    assert not backbone.level_causal
    features = torch.randn(1, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    (backbone(features)[0, 2] @ torch.randn(WIDTH).double()).backward()
    assert (features.grad[0].abs().amax(dim=-1) > 0).all()
    torch.testing.assert_close(backbone(features), backbone.linear(backbone.lstm(features)[0]))


@pytest.mark.parametrize(
    "levels",
    [
        Parity().levels(4),
        Strided(columns=2).levels(5),
        Permutation([1, 0, 2]).levels(3),
        torch.tensor([0, 1, -1]),
        torch.tensor([0, 0]),
        torch.tensor([1, 2, 3]),
    ],
    ids=str,
)
def test_other_orderings_are_refused_with_the_way_out(levels):
    backbone = LSTM(WIDTH)
    content, query = torch.randn(2, len(levels), WIDTH), torch.randn(len(levels), WIDTH)
    message = r"Natural and Reversed, not the levels .*bidirectional=True, or take a Transformer"
    with pytest.raises(UserError, match=message):
        backbone(content, query, levels)
    with pytest.raises(UserError, match=message):
        backbone.begin(query, levels, batch_size=2)


def test_levels_changed_in_place_are_read_again():
    backbone = LSTM(WIDTH)
    content, query = torch.randn(2, 3, WIDTH), torch.randn(3, WIDTH)
    levels = Natural().levels(3)
    forth = backbone(content, query, levels)
    levels.copy_(Reversed().levels(3))
    back = backbone(content, query, levels)
    torch.testing.assert_close(
        back, backbone(content.flip(1), query.flip(0), torch.arange(3)).flip(1)
    )
    assert not torch.allclose(back, forth)
    levels.copy_(torch.tensor([0, 1, 0]))
    with pytest.raises(UserError, match="Natural and Reversed"):
        backbone(content, query, levels)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_whole_pass_and_steps_use_the_same_operations(layers, autocast):
    backbone = LSTM(64, layers, hidden=128).eval()
    content, query, levels = torch.randn(4, 16, 64), torch.randn(16, 64), torch.arange(16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = backbone(content, query, levels)
        cache = backbone.begin(query, levels, 4)
        steps = [
            backbone.advance(cache, n, content[:, n - 1 : n] if n else None) for n in range(16)
        ]
    steps = torch.cat(steps, dim=1)
    assert steps.dtype == whole.dtype
    if autocast:
        assert (steps == whole).float().mean() > 0.99
    else:
        torch.testing.assert_close(steps, whole, rtol=0, atol=1e-6)


def test_dropout_is_between_layers():
    assert LSTM(WIDTH, layers=2, dropout=0.5).lstm.dropout == 0.5
    backbone = LSTM(WIDTH, layers=1, dropout=0.5)
    content, query, levels = torch.randn(2, 3, WIDTH), torch.randn(3, WIDTH), torch.arange(3)
    assert torch.equal(backbone(content, query, levels), backbone(content, query, levels))


class TestResume:
    @pytest.mark.parametrize(("layers", "hidden"), [(1, None), (2, 5)])
    def test_windows_that_go_on_are_one_sequence(self, layers, hidden):
        backbone = LSTM(WIDTH, layers, hidden=hidden).double()
        content = torch.randn(2, 9, WIDTH, dtype=torch.float64)
        query = torch.randn(9, WIDTH, dtype=torch.float64)
        whole = backbone(content, query, torch.arange(9))
        before, state = backbone.start.expand(2, WIDTH), None
        for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
            levels = torch.arange(part.stop - part.start)
            features, state = backbone.resume(content[:, part], query[part], levels, before, state)
            torch.testing.assert_close(features, whole[:, part])
            before = content[:, part.stop - 1]

    @pytest.mark.parametrize("levels", [[2, 1, 0], [-1, 0, 1]])
    def test_other_directions_are_refused(self, levels):
        backbone = LSTM(WIDTH)
        content, query = torch.randn(2, 3, WIDTH), torch.randn(3, WIDTH)
        with pytest.raises(UserError, match="from left to right"):
            backbone.resume(content, query, torch.tensor(levels), content[:, 0])


class TestWeightDrop:
    def example(self, **options):
        torch.manual_seed(0)
        return LSTM(WIDTH, **options), torch.randn(2, 4, WIDTH), torch.randn(4, WIDTH)

    @pytest.mark.parametrize(
        "options", [{}, {"layers": 2, "hidden": 5}, {"layers": 2, "bidirectional": True}]
    )
    def test_it_is_an_lstm_of_dropped_weights(self, options):
        backbone, content, query = self.example(weight_drop=0.5, **options)
        given = (content,) if options.get("bidirectional") else (content, query, torch.arange(4))
        torch.manual_seed(1)
        features = backbone(*given)
        features.square().sum().backward()
        torch.manual_seed(1)
        plain = LSTM(WIDTH, **options)
        plain.load_state_dict(backbone.state_dict())
        torch.manual_seed(1)
        dropped = {}
        with torch.no_grad():
            for name, weight in plain.lstm.named_parameters():
                if "weight_hh" in name:
                    weight.copy_(nn.functional.dropout(weight, 0.5))
                    dropped[name] = weight == 0
        torch.testing.assert_close(plain(*given), features)
        for name, zero in dropped.items():
            assert 0 < zero.float().mean() < 1
            assert not backbone.lstm.get_parameter(name).grad[zero].any()

    def test_it_is_off_in_evaluation(self):
        backbone, content, query = self.example(weight_drop=0.5)
        levels = torch.arange(4)
        assert not torch.equal(backbone(content, query, levels), backbone(content, query, levels))
        plain = LSTM(WIDTH)
        plain.load_state_dict(backbone.state_dict())
        backbone.eval()
        assert torch.equal(backbone(content, query, levels), plain(content, query, levels))

    @pytest.mark.parametrize("weight_drop", [-0.1, 1.0])
    def test_it_is_a_probability(self, weight_drop):
        with pytest.raises(UserError, match=f"weight_drop is {weight_drop}"):
            LSTM(WIDTH, weight_drop=weight_drop)
