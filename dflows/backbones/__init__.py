"""The networks inside a flow: maps of features (B, D, width) to features (B, D, width)."""

from dflows.backbones.backbone import Backbone, State, StatefulBackbone, SteppedBackbone
from dflows.backbones.convolution import DilatedConvolution
from dflows.backbones.level_convolution import LevelConvolution
from dflows.backbones.lstm import LSTM
from dflows.backbones.made import MADE
from dflows.backbones.masked import Masked, as_backbone
from dflows.backbones.table import Table
from dflows.backbones.transformer import Transformer

__all__ = [
    "LSTM",
    "MADE",
    "Backbone",
    "DilatedConvolution",
    "LevelConvolution",
    "Masked",
    "State",
    "StatefulBackbone",
    "SteppedBackbone",
    "Table",
    "Transformer",
    "as_backbone",
]
