"""All bijections and gradient rules by name, and an exact reference of each, for the tests."""

from itertools import product

import torch
from torch.nn import functional as F

from dflows import modular
from dflows.bijections import MatchedAffine, ModularAffine, ModularShift, RankPermutation
from dflows.gradients import GumbelStraightThrough, PosteriorRule, ReinMax, SoftmaxStraightThrough

OF_A_SOFTMAX = {
    "shift": ModularShift,
    "affine": ModularAffine,
    "affine-prime": lambda num_classes, rule=None: ModularAffine(num_classes, True, rule),
    "matched": MatchedAffine,
}

BIJECTIONS = OF_A_SOFTMAX | {"rank": RankPermutation}

RULES = {
    "straight-through": SoftmaxStraightThrough,
    "gumbel": GumbelStraightThrough,
    "reinmax": ReinMax,
    "posterior": PosteriorRule,
}


def every_map(bijection):
    """What is made of every class by every combination of choices, as ones and zeros.

    A tensor (M, …, M, K, K) in double precision: a dimension for every choice, then the class
    before and after. The entries of choices that are masked are 0.
    """
    num_classes = bijection.num_classes
    if isinstance(bijection, MatchedAffine):
        scales = modular.units(num_classes).tolist()
        maps, modulus = list(product(range(num_classes), scales)), num_classes
        table = torch.zeros(len(maps), num_classes, num_classes, dtype=torch.float64)
    elif isinstance(bijection, ModularShift):
        maps, modulus = [(loc, 1) for loc in range(num_classes)], num_classes
        table = torch.zeros(num_classes, num_classes, num_classes, dtype=torch.float64)
    else:
        modulus = bijection.modulus
        maps = list(product(range(modulus), modular.units(modulus).tolist()))
        table = torch.zeros(modulus, modulus, num_classes, num_classes, dtype=torch.float64)
    for number, (loc, scale) in enumerate(maps):
        for x in range(num_classes):
            y = (loc + scale * x) % modulus
            while y >= num_classes:
                y = (loc + scale * y) % modulus
            place = (loc, scale) if isinstance(bijection, ModularAffine) else (number,)
            table[(*place, x, y)] = 1
    return table


def dense(bijection, value, choices, inverse):
    """The form that is linear in the value (…, K) and in every choice (…, M)."""
    letters = "abc"[: len(choices)]
    ends = ("y", "x") if inverse else ("x", "y")
    form = f"...{ends[0]},{''.join(f'...{c},' for c in letters)}{letters}xy->...{ends[1]}"
    return torch.einsum(form, value, *choices, every_map(bijection))


def one_hot(indices, num_classes, dtype=torch.float32):
    return F.one_hot(indices, num_classes).to(dtype)
