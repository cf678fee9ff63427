"""Distributions of x."""

from dflows.bases.any_order import AnyOrderBase
from dflows.bases.autoregressive import AutoregressiveBase
from dflows.bases.base import Base, ClosedFormBase
from dflows.bases.factorized import FactorizedBase
from dflows.bases.ngram import NGramBase

__all__ = [
    "AnyOrderBase",
    "AutoregressiveBase",
    "Base",
    "ClosedFormBase",
    "FactorizedBase",
    "NGramBase",
]
