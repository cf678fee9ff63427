import pytest
import torch
from torch import nn

from dflows.backbones import LSTM
from dflows.errors import UserError
from dflows.orderings import CoarseToFine, Halves, Natural, Parity, Permutation, Reversed, Strided

WIDTH = 6


def by_cells(backbone, rows):
    """The hidden units after a sequence of inputs (B, width), by the cells of PyTorch."""
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
    return x


def read_out(backbone, hidden):
    return backbone.linear(hidden) + backbone.readout(hidden)


LANES = {
    "natural": (Natural(), [[0, 1, 2, 3, 4]]),
    "reversed": (Reversed(), [[4, 3, 2, 1, 0]]),
    "two lanes, the last shorter": (Strided(3), [[0, 1, 2], [3, 4]]),
    "lanes of one": (Strided(1), [[0], [1], [2], [3], [4]]),
    "the same levels by another name": (Parity(), [[0, 1], [2, 3], [4]]),
    "lanes that share a head": (Permutation([2, 1, 3, 0, 4]), None),
}


@pytest.mark.parametrize(("ordering", "lanes"), LANES.values(), ids=LANES)
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize(("layers", "hidden"), [(1, None), (2, 5)])
def test_lanes_equal_cells(ordering, lanes, context, layers, hidden):
    backbone = LSTM(WIDTH, layers, hidden=hidden).double()
    levels = torch.cat([torch.full((context,), -1), ordering.levels(5)])
    content = torch.randn(2, len(levels), WIDTH, dtype=torch.float64)
    query = torch.randn(len(levels), WIDTH, dtype=torch.float64)
    if lanes is None:
        with pytest.raises(UserError, match="one dimension after the other"):
            backbone(content, query, levels)
        return
    features = backbone(content, query, levels)
    for lane in lanes:
        inputs, before = [], backbone.start
        for d in [*range(context), *(context + d for d in lane)]:
            inputs.append((before + query[d]).expand(2, WIDTH))
            before = content[:, d]
            expected = read_out(backbone, by_cells(backbone, inputs))
            torch.testing.assert_close(features[:, d], expected)


def changes(backbone, levels):
    """Whether other content at a dimension (D, ·) changes the features at another (·, D)."""
    length = len(levels)
    content, query = torch.randn(1, length, WIDTH), torch.randn(length, WIDTH)
    before, found = backbone(content, query, levels), []
    for source in range(length):
        other = content.clone()
        other[:, source] = torch.randn(WIDTH)
        after = backbone(other, query, levels)
        found.append((after - before).abs().amax(dim=-1)[0] > 1e-6)
    return torch.stack(found)


def test_lanes_may_run_to_the_left():
    """Of every two lanes one is read from right to left, and both begin at the same place."""
    backbone = LSTM(WIDTH, ahead=3)
    levels = torch.tensor([2, 1, 0, 0, 1, 2, 2, 1, 0])
    for source, changed in enumerate(changes(backbone, levels)):
        lower = levels[source] < levels
        assert not changed[~lower].any()
        lanes = torch.arange(9) // 3 == source // 3
        assert changed[lower & lanes].all()
    # The end of the second lane sees the third, whose end it meets.
    assert changes(backbone, levels)[7, 5]


@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
def test_the_end_of_a_lane_sees_the_next_one_as_far_as_it_reaches(ahead):
    backbone = LSTM(WIDTH, ahead=ahead)
    levels = Strided(columns=3).levels(8)
    for source, changed in enumerate(changes(backbone, levels)):
        for target in range(8):
            same_lane = source // 3 == target // 3
            near = 0 < source - target <= ahead
            # What a dimension saw ahead is remembered along its lane.
            ahead_of_lane = any(
                0 < source - d <= ahead and levels[source] < levels[d]
                for d in range(target // 3 * 3, target + 1)
            )
            if levels[source] >= levels[target]:
                assert not changed[target]
            elif same_lane or near:
                assert changed[target]
            else:
                assert changed[target] == ahead_of_lane


def test_it_serves_every_number_of_levels():
    backbone = LSTM(WIDTH, ahead=2)
    content, query = torch.randn(2, 12, WIDTH), torch.zeros(12, WIDTH)
    assert backbone.knows_levels
    features = [backbone(content, query, Strided(columns).levels(12)) for columns in (3, 4, 12)]
    # The first lane does not know how long it is before its end comes near.
    torch.testing.assert_close(features[1][:, :2], features[2][:, :2])
    assert not LSTM(WIDTH, bidirectional=True).knows_levels


@pytest.mark.parametrize("columns", [12, 4])
def test_all_parameters_get_a_gradient(columns):
    backbone = LSTM(WIDTH, ahead=2)
    content, query = torch.randn(2, 12, WIDTH), torch.zeros(12, WIDTH)
    backbone(content, query, Strided(columns).levels(12)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_without_a_read_out_the_features_are_linear():
    backbone = LSTM(WIDTH, readout=0)
    content, query = torch.randn(2, 3, WIDTH), torch.randn(3, WIDTH)
    inputs = torch.cat([backbone.start.expand(2, 1, -1), content[:, :-1]], dim=1) + query
    torch.testing.assert_close(
        backbone(content, query, torch.arange(3)), backbone.linear(backbone.lstm(inputs)[0])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": -1}, "readout is -1"),
        ({"ahead": -2}, "ahead -2: give at least 0"),
        ({"ahead": 2, "bidirectional": True}, "sees all that is not masked: unset one of them"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LSTM(WIDTH, **options)


def test_bidirectional_sees_everything_and_takes_features_only():
    backbone = LSTM(WIDTH, bidirectional=True, hidden=4).double()
    assert not backbone.level_causal
    features = torch.randn(1, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    (backbone(features)[0, 2] @ torch.randn(WIDTH).double()).backward()
    assert (features.grad[0].abs().amax(dim=-1) > 0).all()
    torch.testing.assert_close(backbone(features), read_out(backbone, backbone.lstm(features)[0]))


@pytest.mark.parametrize(
    "levels",
    [
        Halves().levels(4),
        CoarseToFine(4).levels(5),
        Parity(first=1).levels(5),
        Permutation([1, 0, 2]).levels(3),
        torch.tensor([0, 1, -1]),
        torch.tensor([1, 2, 3]),
    ],
    ids=str,
)
def test_other_orderings_are_refused_with_the_way_out(levels):
    backbone = LSTM(WIDTH)
    content, query = torch.randn(2, len(levels), WIDTH), torch.randn(len(levels), WIDTH)
    message = r"Natural, Reversed and Strided, not the levels .*bidirectional=True, or take a Tra"
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
    levels.copy_(torch.tensor([0, 0, 2]))
    with pytest.raises(UserError, match="Natural, Reversed"):
        backbone(content, query, levels)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_whole_pass_and_steps_use_the_same_operations(layers):
    backbone = LSTM(64, layers, hidden=128).eval()
    content, query, levels = torch.randn(4, 16, 64), torch.randn(16, 64), torch.arange(16)
    with torch.no_grad():
        whole = backbone(content, query, levels)
        cache = backbone.begin(query, levels, 4)
        steps = [
            backbone.advance(cache, n, content[:, n - 1 : n] if n else None) for n in range(16)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-6)


def test_dropout_is_between_layers_and_behind_the_last():
    assert LSTM(WIDTH, layers=2, dropout=0.5).lstm.dropout == 0.5
    backbone = LSTM(WIDTH, dropout=0.5)
    content, query, levels = torch.randn(2, 3, WIDTH), torch.randn(3, WIDTH), torch.arange(3)
    assert not torch.equal(backbone(content, query, levels), backbone(content, query, levels))
    backbone.eval()
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
