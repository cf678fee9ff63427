import copy

import pytest
import torch
from torch import nn

from dflows.backbones import LSTM, DilatedConvolution, Masked, as_backbone
from dflows.errors import UserError

WIDTH = 8


class Own(nn.Linear):
    """A network that tells its width."""

    def __init__(self, width=WIDTH):
        super().__init__(width, width)
        self.width = width


def encoder():
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, dropout=0.5)


def test_it_is_the_network():
    network = encoder().eval()
    backbone = Masked(network, WIDTH)
    features = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(backbone(features), network(features))
    assert (backbone.width, backbone.level_causal, backbone.embeds) == (WIDTH, False, True)
    assert not backbone.knows_positions


def test_training_and_evaluation_reach_the_network():
    backbone, features = Masked(encoder(), WIDTH), torch.randn(2, 5, WIDTH)
    assert not torch.equal(backbone(features), backbone(features))
    backbone.eval()
    assert not backbone.network.training
    assert torch.equal(backbone(features), backbone(features))
    other = Masked(encoder(), WIDTH).eval()
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other(features), backbone(features))
    twin = copy.deepcopy(backbone)
    assert torch.equal(twin(features), backbone(features))
    assert twin.network is not backbone.network


def test_the_width_is_the_networks_own_where_it_tells_it():
    assert Masked(Own()).width == Masked(Own(), WIDTH).width == WIDTH
    with pytest.raises(UserError, match="width is 4 and the Own's own is 8: leave `width` away"):
        Masked(Own(), 4)
    with pytest.raises(UserError, match=r"width of a Linear is not known.*network, width=64"):
        Masked(nn.Linear(WIDTH, WIDTH))
    with pytest.raises(UserError, match="width is 0"):
        Masked(nn.Identity(), 0)


def test_as_backbone_wraps_other_modules_alone():
    own = DilatedConvolution(WIDTH)
    assert as_backbone(own) is own
    wrapped = as_backbone(Own())
    assert isinstance(wrapped, Masked)
    assert wrapped.width == WIDTH
    assert as_backbone(wrapped) is wrapped
    with pytest.raises(UserError, match=r"width of a Sequential is not known"):
        as_backbone(nn.Sequential(nn.Linear(WIDTH, WIDTH)))


def test_a_backbone_is_not_masked():
    with pytest.raises(UserError, match="LSTM is a backbone already: hand it over as it is"):
        Masked(LSTM(WIDTH))


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (nn.Linear(WIDTH, 4), r"Linear returned \(2, 5, 4\) for features \(2, 5, 8\)"),
        (nn.Conv1d(5, 3, 1), r"Conv1d returned \(2, 3, 8\)"),
        (nn.LSTM(WIDTH, WIDTH, batch_first=True), "LSTM returned tuple"),
    ],
    ids=["width", "length", "tuple"],
)
def test_other_shapes_are_refused(network, found):
    backbone = Masked(network, WIDTH)
    for call in (backbone, lambda features: backbone.features_at(torch.tensor([0]), features)):
        with pytest.raises(UserError, match=found):
            call(torch.randn(2, 5, WIDTH))
