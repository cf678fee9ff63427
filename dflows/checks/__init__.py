"""Certificates: what a flow must be before training time is spent on it, or a figure recorded.

A flow's likelihood is exact only if its transforms are bijective, its networks keep to their
orderings, and its probabilities sum to 1. The checks here look for what is not so, on the flow's
own shapes as far as that takes seconds. Those of a flow see it in full precision, as it is
evaluated; those of a network or a transform by itself have autocast as the caller has it. They
probe copies, whose parameters are shaken, since at initialisation a flow is the identity and hides
what its network does; and, of a trained flow, as they are.
"""

from dflows.checks.bijectivity import check_bijective
from dflows.checks.causality import check_autoregressive, check_causal
from dflows.checks.flow import check_flow, check_shorter
from dflows.checks.normalization import check_above_entropy, check_normalized
from dflows.checks.probing import CertificateError

__all__ = [
    "CertificateError",
    "check_above_entropy",
    "check_autoregressive",
    "check_bijective",
    "check_causal",
    "check_flow",
    "check_normalized",
    "check_shorter",
]
