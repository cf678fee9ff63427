"""What is done to one K-class variable, given logits."""

from dflows.bijections.affine import ModularAffine
from dflows.bijections.bijection import Bijection, SoftmaxBijection
from dflows.bijections.matched import MatchedAffine
from dflows.bijections.per_dimension import PerDimension
from dflows.bijections.rank import RankPermutation
from dflows.bijections.shift import ModularShift

__all__ = [
    "Bijection",
    "MatchedAffine",
    "ModularAffine",
    "ModularShift",
    "PerDimension",
    "RankPermutation",
    "SoftmaxBijection",
]
