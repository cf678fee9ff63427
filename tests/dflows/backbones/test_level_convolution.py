import copy

import pytest
import torch

from dflows.backbones import LevelConvolution
from dflows.checks import check_autoregressive
from dflows.errors import UserError
from tests.dflows.small import ORDERINGS, WIDTH, shaken


def evaluate(network, content, query, levels):
    with torch.no_grad():
        return network(content, query, levels)


@pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("distances", [(1,), (1, 2, 4), (3, 9)])
def test_it_keeps_to_the_levels_and_sees_its_neighbours(ordering, window, distances):
    network = LevelConvolution(WIDTH, layers=1, distances=distances, window=window)
    shaken(network)
    levels = ordering.levels(5)
    content, query = torch.randn(2, 5, WIDTH), torch.randn(5, WIDTH)
    before = evaluate(network, content, query, levels)
    direct = {*distances, *range(1, window + 1)}
    furthest = max(distances) + window
    for source in range(5):
        changed = content.clone()
        changed[:, source] = torch.randn(2, WIDTH)
        after = evaluate(network, changed, query, levels)
        for target in range(5):
            sees = (after[:, target] - before[:, target]).abs().max() > 1e-6
            distance, lower = abs(source - target), levels[source] < levels[target]
            if distance in direct:
                assert sees == lower
            if sees:
                assert lower
                assert distance <= furthest
            if not window:
                assert sees == (lower and distance in direct)


def test_of_its_own_level_it_sees_the_query():
    network = shaken(LevelConvolution(WIDTH, layers=1, distances=(1,)))
    levels = torch.tensor([0, 0, 1, 1])
    content, query = torch.randn(2, 4, WIDTH), torch.randn(4, WIDTH)
    before = evaluate(network, content, query, levels)
    changed = query.clone()
    changed[3] = torch.randn(WIDTH)
    seen = (evaluate(network, content, changed, levels) - before).abs().amax((0, 2)) > 1e-6
    assert seen.tolist() == [False, False, True, True]


def test_context_in_front_is_seen_by_all_levels():
    network = shaken(LevelConvolution(WIDTH, layers=1, distances=(1, 2, 3)))
    levels = torch.tensor([-1, 0, 1, 0])
    content, query = torch.randn(2, 4, WIDTH), torch.randn(4, WIDTH)
    before = evaluate(network, content, query, levels)
    content[:, 0] = torch.randn(2, WIDTH)
    seen = (evaluate(network, content, query, levels) - before).abs().amax((0, 2)) > 1e-6
    assert seen.tolist() == [False, True, True, True]


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 16])
def test_every_depth_and_length_is_causal(layers, length):
    network = LevelConvolution(WIDTH, layers=layers, window=3)
    for ordering in ORDERINGS.values():
        if length <= 5 or "order" not in vars(ordering):
            check_autoregressive(network, length, ordering)


def test_one_network_serves_several_orderings_in_turn():
    # Masks are kept from call to call; those of another ordering must not be taken.
    network = shaken(LevelConvolution(WIDTH, layers=2))
    content, query = torch.randn(2, 5, WIDTH), torch.randn(5, WIDTH)
    levels = [ordering.levels(5) for ordering in ORDERINGS.values()]
    fresh = [evaluate(copy.deepcopy(network), content, query, level) for level in levels]
    for _ in range(2):
        for level, expected in zip(levels, fresh, strict=True):
            assert torch.equal(evaluate(network, content, query, level), expected)


def test_every_parameter_receives_a_gradient():
    network = shaken(LevelConvolution(WIDTH, layers=2, window=1))
    network(torch.randn(2, 6, WIDTH), torch.randn(6, WIDTH), torch.arange(6)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    network = shaken(LevelConvolution(WIDTH, layers=2, window=1))
    inputs = torch.randn(2, 6, WIDTH), torch.randn(6, WIDTH)
    levels = torch.arange(6) % 3
    expected = evaluate(network, *inputs, levels)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            actual = evaluate(network, *inputs, levels)
        torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.1)
    else:
        actual = evaluate(network.to(dtype), *(value.to(dtype) for value in inputs), levels)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected)


def test_masks_made_in_inference_mode_serve_training():
    network, levels = shaken(LevelConvolution(WIDTH, layers=1, window=1)), torch.arange(6)
    inputs = torch.randn(2, 6, WIDTH), torch.randn(6, WIDTH)
    with torch.inference_mode():
        network(*inputs, levels)
    network(*inputs, levels).sum().backward()


def test_state_dict_and_repr():
    network = shaken(LevelConvolution(WIDTH, layers=1, distances=(1, 3), window=1))
    inputs = torch.randn(2, 6, WIDTH), torch.randn(6, WIDTH), torch.arange(6)
    expected = evaluate(network, *inputs)
    other = LevelConvolution(WIDTH, layers=1, distances=(1, 3), window=1)
    other.load_state_dict(network.state_dict())
    assert torch.equal(evaluate(other, *inputs), expected)
    assert "width=8, offsets=[-1, 1, -3, 3], window=1" in repr(network)


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0},
        {"layers": 0},
        {"distances": []},
        {"distances": [0, 1]},
        {"window": -1},
        {"dropout": 1.0},
    ],
)
def test_sizes_that_make_no_sense_are_refused(options):
    with pytest.raises(UserError, match="give"):
        LevelConvolution(**{"width": WIDTH} | options)


def test_a_call_that_does_not_fit_is_refused():
    network = LevelConvolution(WIDTH)
    content, query, levels = torch.randn(2, 6, WIDTH), torch.randn(6, WIDTH), torch.arange(6)
    with pytest.raises(UserError, match="content, query and levels"):
        network(content)
    with pytest.raises(UserError, match="width=8"):
        network(content[..., :-1], query, levels)
    with pytest.raises(UserError, match="the query must be"):
        network(content, query[:-1], levels)
