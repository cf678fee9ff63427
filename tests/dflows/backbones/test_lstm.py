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


def test_dropout_is_between_layers():
    assert LSTM(WIDTH, layers=2, dropout=0.5).lstm.dropout == 0.5
    backbone = LSTM(WIDTH, layers=1, dropout=0.5)
    content, query, levels = torch.randn(2, 3, WIDTH), torch.randn(3, WIDTH), torch.arange(3)
    assert torch.equal(backbone(content, query, levels), backbone(content, query, levels))
