"""Distributions, stacks and a bijection that the tests of this folder share."""

import math

import numpy as np
import torch

from dflows.bijections import Bijection
from dflows.orderings import Natural, Ordering, Reversed


def full_rank(length, num_classes, seed=0):
    """The distribution of the published experiments."""
    draw = np.random.default_rng(seed).dirichlet(np.ones(num_classes**length))
    return torch.from_numpy(draw.reshape((num_classes,) * length))


def mixture(num_classes=91, modes=8):
    """Gaussians on a circle, on a grid."""
    angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    grid = torch.arange(num_classes, dtype=torch.float64)
    axes = []
    for direction in (angle.cos(), angle.sin()):
        centre = (num_classes - 1) / 2 + 0.32 * num_classes * direction
        axes.append((-(((grid - centre[:, None]) / (0.035 * num_classes)) ** 2) / 2).exp())
    table = torch.einsum("mi,mj->ij", *axes)
    return table / table.sum()


class Part(Ordering):
    """Some dimensions condition the others."""

    def __init__(self, first):
        self.first = first

    def levels(self, length):
        return torch.tensor([0 if d in self.first else 1 for d in range(length)])


def autoregressive(flows):
    return [Reversed() if number % 2 else Natural() for number in range(flows)]


def bipartite(flows, length):
    """Both halves, and then random ones, from the data on."""
    draw = np.random.default_rng(0)
    parts = [range(length // 2), range(length // 2, length)]
    while len(parts) < flows:
        order = draw.permutation(length).tolist()
        parts += [order[: length // 2], order[length // 2 :]]
    return [Part(sorted(part)) for part in reversed(parts[:flows])]


class Reflection(Bijection):
    """A user's own: the classes as they are, or the other way round."""

    needs_target = False

    def __init__(self, num_classes):
        super().__init__(num_classes, num_logits=2)

    def initial_logits(self):
        return torch.tensor([0.1, 0.0])

    def forward(self, x, logits):
        return torch.where(logits[..., 1] > logits[..., 0], self.num_classes - 1 - x, x)

    inverse = forward
    local_log_likelihood = sample_inverse = None
