import pytest
import torch
from torch.nn import functional as F

from dflows.backbones import MADE
from dflows.orderings import Natural, Parity, Permutation, Strided

WIDTH = 4


def by_loops(backbone, content, query, levels):
    """The features of one example, with every weight that the levels forbid left out by hand."""
    hidden, lowest = backbone.first.out_features, int(levels.min())
    count = max(int(levels.max()) - lowest, 1)
    degrees = [lowest + unit * count // hidden for unit in range(hidden)]
    h = backbone.first.bias.clone()
    for unit in range(hidden):
        for d, level in enumerate(levels.tolist()):
            if level <= degrees[unit]:
                weight = backbone.first.weight[unit, d * WIDTH : (d + 1) * WIDTH]
                h[unit] = h[unit] + weight @ content[d]
    for layer in backbone.between:
        h, before = layer.bias.clone(), F.gelu(h)
        for unit in range(hidden):
            for other in range(hidden):
                if degrees[other] <= degrees[unit]:
                    h[unit] = h[unit] + layer.weight[unit, other] * before[other]
    features = []
    for d, level in enumerate(levels.tolist()):
        rows = slice(d * WIDTH, (d + 1) * WIDTH)
        total = backbone.last.bias[rows] + backbone.query(query[d])
        for unit in range(hidden):
            if degrees[unit] < level:
                total = total + backbone.last.weight[rows, unit] * F.gelu(h[unit])
        features.append(backbone.mix(F.gelu(total)))
    return torch.stack(features)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "levels",
    [
        Natural().levels(5),
        Permutation([3, 0, 2, 1]).levels(4),
        Strided(columns=2).levels(3),
        Parity().levels(1),
        torch.tensor([-1, -1, 1, 0, 1]),
    ],
    ids=str,
)
def test_equals_loops(layers, levels):
    backbone = MADE(WIDTH, length=5, hidden=11, layers=layers).double()
    content = torch.randn(2, len(levels), WIDTH, dtype=torch.float64)
    query = torch.randn(len(levels), WIDTH, dtype=torch.float64)
    features = backbone(content, query, levels)
    for n in range(2):
        torch.testing.assert_close(features[n], by_loops(backbone, content[n], query, levels))


def test_few_units_are_spread_over_all_levels():
    backbone = MADE(WIDTH, length=9, hidden=3, layers=1).double()
    content = torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    query = torch.randn(9, WIDTH, dtype=torch.float64)
    backbone(content, query, torch.arange(9))[:, 8].square().sum().backward()
    seen = content.grad[0].abs().amax(dim=-1) > 0
    assert seen.tolist() == [True] * 6 + [False] * 3


def test_content_of_a_single_level_is_not_looked_at():
    backbone = MADE(WIDTH, length=3, hidden=8)
    query, levels = torch.randn(3, WIDTH), torch.zeros(3, dtype=torch.long)
    content = torch.randn(2, 3, WIDTH)
    assert torch.equal(backbone(content, query, levels), backbone(-content, query, levels))


def test_repr_names_the_sizes():
    assert "width=4, length=3" in repr(MADE(WIDTH, length=3, hidden=8))
