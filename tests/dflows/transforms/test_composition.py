import pytest
import torch

from dflows.conditioner import Context
from dflows.orderings import Natural, Parity, Reversed
from dflows.representations import to_one_hot
from dflows.transforms import Composition, PermutationTransform
from tests.dflows.small import make_transform, shaken, states


def stack(backbone="causal", **options):
    return shaken(
        Composition(
            [
                make_transform(3, 4, Natural(), "affine", backbone=backbone, **options),
                PermutationTransform([2, 0, 3, 1]),
                Composition([make_transform(3, 4, Parity(), "rank", backbone=backbone, **options)]),
                make_transform(3, 4, Reversed(), "shift", backbone=backbone, **options),
            ]
        )
    )


@pytest.mark.parametrize("backbone", ["causal", "masked"])
def test_it_is_a_bijection_one_transform_after_the_other(backbone):
    composition, x = stack(backbone), states(3, 4)
    y = composition(x)
    by_hand = x
    for transform in composition.transforms:
        by_hand = transform(by_hand)
    assert torch.equal(y, by_hand)
    assert len(y.unique(dim=0)) == 81
    assert torch.equal(composition.inv(y), x)
    with torch.no_grad():
        assert torch.equal(composition(to_one_hot(x, 3)), to_one_hot(y, 3))


def test_log_determinants_are_zeros_and_every_part_is_trained():
    composition = stack()
    y = torch.randint(3, (2, 3, 4))
    assert torch.equal(composition.log_abs_det_jacobian(y, y), torch.zeros(2, 3))
    x = composition.inverse(to_one_hot(y, 3))
    assert torch.equal(x.argmax(-1), composition.inverse(y))
    (x * torch.randn(3)).sum().backward()
    assert all(parameter.grad is not None for parameter in composition.parameters())


def test_parts_are_those_of_nested_ones_too():
    composition = stack()
    names = [type(part).__name__ for part in composition.parts]
    assert names == [
        "ConditionalTransform",
        "PermutationTransform",
        "ConditionalTransform",
        "ConditionalTransform",
    ]
    assert [part.ordering for part in composition.parts] == [Natural(), None, Parity(), Reversed()]
    assert composition.ordering is None


def test_passes_and_fixed_points_add_up():
    composition, x = stack(), torch.randint(3, (5, 4))
    assert composition.passes == 3 + 0 + 1 + 3
    with torch.no_grad():
        y, evaluations = composition.generate(x, fixed_point=True)
        assert torch.equal(y, composition(x))
    assert 3 <= evaluations <= composition.passes + 3


def test_a_context_goes_to_all():
    composition = stack(context=Context(2))
    context, x = torch.randn(2, 2), torch.randint(3, (20, 2, 4))
    y = composition(x, context)
    assert torch.equal(composition.inverse(y, context), x)
    assert not torch.equal(composition(x, -context), y)


def test_of_nothing_it_is_the_identity():
    x = states(3, 2)
    assert torch.equal(Composition([])(x), x)
    assert Composition([]).passes == 0


@pytest.mark.parametrize("takes", [False, True])
def test_it_says_whether_it_takes_a_context(takes):
    composition = stack(context=Context(2) if takes else None)
    assert composition.takes_context == composition.inv.takes_context == takes
