"""Latent-variable models of sequences: a continuous flow as prior, a factorized emission."""

from dflows.latent.model import LatentFlow, Terms
from dflows.latent.prior import AutoregressivePrior, FlowPrior, InverseAutoregressivePrior
from dflows.latent.squared import NonlinearSquared

__all__ = [
    "AutoregressivePrior",
    "FlowPrior",
    "InverseAutoregressivePrior",
    "LatentFlow",
    "NonlinearSquared",
    "Terms",
]
