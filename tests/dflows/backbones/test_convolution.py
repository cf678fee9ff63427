import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dflows.backbones import DilatedConvolution
from dflows.backbones.convolution import GatedLayer
from dflows.errors import UserError


@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_layer_equals_a_convolution_of_pytorch(dilation, kernel, length):
    backbone = DilatedConvolution(width=4, layers=1, dilations=[dilation], kernel=kernel).double()
    (layer,) = backbone.layers
    reach = dilation * (kernel // 2)
    convolution = nn.Conv1d(4, 8, kernel, padding=reach, dilation=dilation).double()
    with torch.no_grad():
        convolution.weight.copy_(layer.linear.weight.unflatten(1, (kernel, 4)).transpose(1, 2))
        convolution.bias.copy_(layer.linear.bias)
    features = torch.randn(3, length, 4, dtype=torch.float64)
    gated = F.glu(convolution(layer.norm(features).transpose(1, 2)).transpose(1, 2), dim=-1)
    torch.testing.assert_close(layer(features), features + gated)
    torch.testing.assert_close(backbone(features), backbone.norm(features + gated))


def test_layers_take_the_dilations_in_turn():
    backbone = DilatedConvolution(width=4, layers=6)
    reach = [layer.offsets for layer in backbone.layers]
    assert reach == [(-n, 0, n) for n in (1, 2, 4, 8, 1, 2)]


def test_a_layer_of_several_dilations_sees_each_neighbour_once():
    (layer,) = DilatedConvolution(width=4, layers=1, dilations=[[2, 1]], kernel=5).layers
    assert layer.offsets == (-4, -2, -1, 0, 1, 2, 4)
    assert layer.linear.in_features == 7 * 4


def test_reach():
    backbone = DilatedConvolution(width=4, layers=2, dilations=[1, 3]).double()
    features = torch.randn(1, 21, 4, dtype=torch.float64, requires_grad=True)
    (backbone(features)[0, 10] @ torch.randn(4).double()).backward()
    seen = features.grad[0].abs().amax(dim=-1).nonzero().squeeze(-1)
    assert seen.tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 14]


def test_offsets_beyond_the_ends_see_zeros():
    layer = GatedLayer(4, (-9, 0, 9)).double()
    features = torch.randn(2, 3, 4, dtype=torch.float64)
    alone = torch.cat([layer(features[:, d : d + 1]) for d in range(3)], dim=1)
    torch.testing.assert_close(layer(features), alone)


def test_a_deep_stack_starts_with_features_and_gradients_of_order_one():
    backbone = DilatedConvolution(width=32, layers=64)
    features = torch.randn(2, 16, 32, requires_grad=True)
    mixed = backbone(features)
    (mixed * torch.randn_like(mixed)).sum().backward()
    assert 0.5 < mixed.std() < 2
    assert 0.05 < features.grad.std() < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": 4}, "kernel is 4: give an odd number"),
        ({"kernel": 0}, "kernel is 0"),
        ({"layers": 0}, "layers is 0"),
        ({"dilations": []}, "dilations is"),
        ({"dilations": [1, 0]}, "give distances of at least 1"),
        ({"dilations": [1, []]}, "give distances of at least 1"),
        ({"dilations": [[1, -2]]}, "give distances of at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        DilatedConvolution(width=4, **arguments)
