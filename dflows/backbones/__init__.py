"""The networks inside a flow: maps of features (B, D, width) to features (B, D, width)."""

from dflows.backbones.backbone import Backbone, SteppedBackbone
from dflows.backbones.convolution import DilatedConvolution
from dflows.backbones.transformer import Transformer

__all__ = ["Backbone", "DilatedConvolution", "SteppedBackbone", "Transformer"]
