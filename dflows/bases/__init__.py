"""Distributions of x, on which the transforms stand."""

from dflows.bases.autoregressive import AutoregressiveBase
from dflows.bases.base import Base
from dflows.bases.factorized import FactorizedBase

__all__ = ["AutoregressiveBase", "Base", "FactorizedBase"]
