"""Small random networks and flows, and all states of small events, for the tests of this folder."""

from itertools import product

import numpy as np
import torch
from torch import nn

from dflows import DiscreteFlow
from dflows.backbones import DilatedConvolution, LevelConvolution, Transformer
from dflows.bases import FactorizedBase
from dflows.bijections import MatchedAffine, ModularAffine, ModularShift, RankPermutation
from dflows.conditioner import Conditioner
from dflows.gradients import (
    GumbelStraightThrough,
    PosteriorRule,
    ReinMax,
    SoftmaxStraightThrough,
)
from dflows.objectives import EndToEnd, Layerwise, Local, LocalExpectationGradient, OneAfterAnother
from dflows.orderings import (
    Blocks,
    CoarseToFine,
    Halves,
    Natural,
    Parity,
    Permutation,
    Reversed,
    Strided,
)
from dflows.transforms import ConditionalTransform

WIDTH = 8

BIJECTIONS = {
    "shift": ModularShift,
    "affine": ModularAffine,
    "affine-prime": lambda num_classes, rule=None: ModularAffine(num_classes, True, rule),
    "matched": MatchedAffine,
    "rank": lambda num_classes, rule=None: RankPermutation(num_classes),  # noqa: ARG005
}
"""Called with the number of classes, and a rule."""

ORDERINGS = {
    "natural": Natural(),
    "reversed": Reversed(),
    "permutation": Permutation([2, 0, 4, 1, 3]),
    "parity": Parity(),
    "odd-first": Parity(first=1),
    "halves": Halves(),
    "right-half-first": Halves(first=1),
    "blocks": Blocks(size=2),
    "strided": Strided(columns=3),
    "coarse-to-fine": CoarseToFine(stride=4),
}

BOTH_PARITIES = (Parity(), Parity(first=1))

RULES = {
    "straight-through": SoftmaxStraightThrough,
    "posterior": PosteriorRule,
    "gumbel": GumbelStraightThrough,
    "reinmax": ReinMax,
}

OBJECTIVES = {
    "end-to-end": EndToEnd,
    "end-to-end-levels": lambda: EndToEnd("levels"),
    "local": Local,
    "local-levels": lambda: Local("levels"),
    "local-transforms": lambda: Local("transforms"),
    "layerwise": Layerwise,
    "local-expectation": LocalExpectationGradient,
    "one-after-another": lambda: OneAfterAnother(Local(), EndToEnd()),
}

BACKBONES = {
    "causal": lambda: Transformer(WIDTH, layers=1, heads=2),
    "causal-convolution": lambda: LevelConvolution(WIDTH, layers=1),
    "masked": lambda: DilatedConvolution(WIDTH, layers=2),
}


def shaken(module, seed=0, scale=0.5):
    """The module with random parameters: at initialisation a flow is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            # Heads start at 0, and the maps should depend on what they are given.
            parameter.add_(noise.to(parameter), alpha=4 * scale if "head.w" in name else scale)
    return module


def states(num_classes, length):
    """All events, (K^D, D)."""
    return torch.tensor(list(product(range(num_classes), repeat=length)))


def make_conditioner(num_classes, length, ordering, backbone="masked", **options):
    """A conditioner; the backbone by its name or as it is."""
    if isinstance(backbone, str):
        backbone = BACKBONES[backbone]()
    return Conditioner(num_classes, length, ordering, backbone, **options)


def make_transform(
    num_classes,
    length,
    ordering,
    bijection="affine",
    backbone="masked",
    rule="straight-through",
    **options,
):
    """A transform; the bijection by its name or as it is, the options those of a conditioner."""
    if isinstance(bijection, str):
        bijection = BIJECTIONS[bijection](num_classes, rule=RULES[rule]())
    conditioner = make_conditioner(
        num_classes, length, ordering, backbone, num_logits=bijection.num_logits, **options
    )
    return ConditionalTransform(bijection, conditioner)


def make_flow(
    num_classes=3,
    length=4,
    orderings=BOTH_PARITIES,
    bijection="affine",
    backbone="masked",
    rule="straight-through",
    *,
    base=None,
    sharing="positions",
    encoder=None,
    **options,
):
    """A random flow, a transform for every ordering; equal calls give equal flows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transforms = [
            make_transform(num_classes, length, ordering, bijection, backbone, rule, **options)
            for ordering in orderings
        ]
    if base is None:
        base = FactorizedBase(num_classes, length, sharing)
    return shaken(DiscreteFlow(base, transforms, encoder))


def prepared(objective, flow):
    """The objective of that name, prepared for the flow, with random parameters of its own."""
    if isinstance(objective, str):
        objective = OBJECTIVES[objective]()
    objective.prepare(flow)
    return shaken(objective, seed=1)


def gradients(module: nn.Module):
    """The gradients of all parameters by name, taken away from the module."""
    taken = {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    module.zero_grad(set_to_none=True)
    return taken


def assert_gradients_close(one, other, **tolerances):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], **tolerances, msg=lambda m, n=name: n + m
        )


def expectation(monkeypatch, function):
    """The mean of a function over all that `torch.randint` may draw in it, one value a call."""
    path, total = [], None
    while True:
        calls, weight = 0, 1.0

        def draw(*arguments, device=None):
            nonlocal calls, weight
            *ends, shape = arguments
            low, high = (0, *ends) if len(ends) == 1 else ends
            if calls == len(path):
                path.append([0, high - low])
            value = low + path[calls][0]
            weight /= high - low
            calls += 1
            return torch.full(shape, value, device=device)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", draw)
            result = function()
        result = {name: weight * value for name, value in result.items()}
        total = result if total is None else {name: total[name] + result[name] for name in result}
        while path and path[-1][0] == path[-1][1] - 1:
            path.pop()
        if not path:
            return total
        path[-1][0] += 1


def markov(size, num_classes, seed=0):
    """A text in which what comes next depends on two before it, and its rare classes are rare."""
    draw = np.random.default_rng(seed)
    table = draw.dirichlet(np.full(num_classes, 0.2), (num_classes, num_classes))
    text = [0, 0]
    for _ in range(size):
        text.append(draw.choice(num_classes, p=table[text[-2], text[-1]]))
    return torch.tensor(text[2:])


def random_probabilities(num_classes, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand([num_classes] * length, generator=generator, dtype=torch.float64)
    return table / table.sum()
