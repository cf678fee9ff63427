"""Transforms of whole events: conditional ones over an ordering, permutations, compositions."""

from dflows.transforms.composition import Composition
from dflows.transforms.conditional import ConditionalTransform
from dflows.transforms.permutation import PermutationTransform
from dflows.transforms.transform import DiscreteTransform, Inverse

__all__ = [
    "Composition",
    "ConditionalTransform",
    "DiscreteTransform",
    "Inverse",
    "PermutationTransform",
]
