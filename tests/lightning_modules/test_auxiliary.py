import pytest
import torch

from dflows.errors import UserError
from lightning_modules.auxiliary import Auxiliary, AuxiliaryHeads

K, D, WIDTH, LAYERS = 3, 5, 4, 3


def example(settings):
    torch.manual_seed(0)
    heads = AuxiliaryHeads(K, WIDTH, LAYERS, settings)
    features = [torch.randn(2, D, WIDTH, requires_grad=True) for _ in range(LAYERS)]
    return heads, features, torch.randint(K, (2, D))


def plain(heads, features, y, active, targets, weight):
    """What is added, character by character."""
    total = torch.zeros(len(y))
    for layer in (*active, LAYERS - 1):
        last = layer == LAYERS - 1
        head = heads.last if last else heads.layers[layer]
        for n in range(len(y)):
            for d in range(D):
                logits = None if head is None else head(features[layer][n, d])
                for target in range(1 if last else 0, targets):
                    if d + target < D:
                        first = (target - last) * K
                        log_probs = logits[first : first + K].log_softmax(-1)
                        total[n] += (weight if target else 1) * log_probs[y[n, d + target]]
    return total


@pytest.mark.parametrize("targets", [1, 2, 3])
@pytest.mark.parametrize(
    ("until", "progress", "active"),
    [(0.5, 0.0, (0, 1)), (0.5, 0.2, (1,)), (0.5, 0.4, ()), (1.0, 0.4, (1,)), (1.0, 0.3, (0, 1))],
)
def test_it_is_the_sum_over_layers_and_targets(targets, until, progress, active):
    heads, features, y = example(Auxiliary(until=until, targets=targets, target_weight=0.3))
    added = heads(features, y, progress)
    torch.testing.assert_close(added, plain(heads, features, y, active, targets, 0.3))
    added.sum().backward()
    for layer, one in enumerate(features[:-1]):
        reached = one.grad is not None and bool(one.grad.any())
        assert reached == (layer in active)
    # All parameters have a gradient, be it zero, so that several processes agree.
    assert all(parameter.grad is not None for parameter in heads.parameters())


def test_targets_alone():
    heads, features, y = example(Auxiliary(layers=False))
    assert not heads.layers
    torch.testing.assert_close(heads(features, y, 0.0), plain(heads, features, y, (), 2, 0.5))


def test_there_is_nothing_behind_the_end():
    heads, features, y = example(Auxiliary(layers=False))
    assert not heads([one[:, :1] for one in features], y[:, :1], 0.0).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"until": 0}, "auxiliary.until is 0"),
        ({"until": 1.5}, "auxiliary.until is 1.5"),
        ({"targets": 0}, "auxiliary.targets is 0"),
        ({"target_weight": 0.0}, "auxiliary.target_weight is 0.0"),
        ({"layers": False, "targets": 1}, "adds no loss"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Auxiliary(**settings)
