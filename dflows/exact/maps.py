"""The maps of one variable that a bijection can make, and the best of them for every context."""

import math
from abc import ABC, abstractmethod
from itertools import permutations

import torch
from torch import Generator, Tensor

from dflows.bijections import Bijection

__all__ = ["BLOCK", "Maps", "maps_of", "swapped"]

BLOCK = 2**21
"""Numbers that a step computes at once, which bounds its memory."""

MOST_LISTED = 720
"""Permutations up to which all are scored; of more, a better one is found by swaps."""


class Maps(ABC):
    """Creates the maps data → base of a bijection; a choice takes one of them for each context."""

    listed: Tensor | None

    @abstractmethod
    def of(self, choice: Tensor) -> Tensor:
        """Returns the maps (C, K) of a choice."""

    @abstractmethod
    def logits(self, choice: Tensor) -> Tensor:
        """Returns logits (C, num_logits) by which the bijection takes the maps of a choice."""

    @abstractmethod
    def best(self, gains: Tensor, choice: Tensor) -> Tensor:
        """Chooses the maps of the greatest sum of gains (C, K, K), of sending a class to another.

        Where there are too many it improves on a choice.
        """

    @abstractmethod
    def best_alone(self, weights: Tensor, log_probs: Tensor) -> Tensor:
        """Chooses the best maps by gains that are products of weights (C, K) and numbers (K,)."""


class Listed(Maps):
    """Creates maps (M, K) with the logits (M, num_logits) that choose each."""

    def __init__(self, listed: Tensor, logits: Tensor) -> None:
        self.listed: Tensor = listed
        self._logits = logits

    def of(self, choice: Tensor) -> Tensor:
        return self.listed[choice]

    def logits(self, choice: Tensor) -> Tensor:
        return self._logits[choice]

    def best(self, gains: Tensor, choice: Tensor) -> Tensor:
        return _best_of(self.listed, gains)

    def best_alone(self, weights: Tensor, log_probs: Tensor) -> Tensor:
        scores = log_probs[self.listed].T
        parts = weights.split(max(BLOCK // len(self.listed), 1))
        return torch.cat([(part @ scores).argmax(dim=-1) for part in parts])


class Permutations(Maps):
    """Creates all permutations of K classes, chosen by the ranks of logits."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.listed = None
        if math.factorial(num_classes) <= MOST_LISTED:
            self.listed = torch.tensor(list(permutations(range(num_classes))))

    def of(self, choice: Tensor) -> Tensor:
        return choice

    def logits(self, choice: Tensor) -> Tensor:
        return -choice.double()

    def best(self, gains: Tensor, choice: Tensor) -> Tensor:
        if self.listed is None:
            return swapped(gains, choice)
        return self.listed[_best_of(self.listed, gains)]

    def best_alone(self, weights: Tensor, log_probs: Tensor) -> Tensor:
        order = weights.argsort(dim=-1, descending=True)
        ranked = log_probs.argsort(descending=True).expand_as(order)
        return torch.empty_like(order).scatter_(-1, order, ranked)


def _best_of(listed: Tensor, gains: Tensor) -> Tensor:
    """Returns the number (C,) of the map of the greatest sum of gains (C, K, K)."""
    numbers = []
    for part in gains.split(max(BLOCK // len(listed), 1)):
        total = part.new_zeros(len(part), len(listed))
        for value, target in enumerate(listed.T):
            total += part[:, value].index_select(-1, target)
        numbers.append(total.argmax(dim=-1))
    return torch.cat(numbers)


def swapped(gains: Tensor, maps: Tensor) -> Tensor:
    """Swaps two targets of permutations (C, K), the best two each time, while it gains anything."""
    maps, size = maps.clone(), maps.shape[1]
    going = torch.arange(len(maps))
    while len(going):
        current = maps[going]
        # Entry (a, b): the gain of sending a to where b is sent.
        gain = gains.gather(-1, current.unsqueeze(1).expand(-1, size, -1))
        own = gain.diagonal(dim1=1, dim2=2)
        gain = gain + gain.transpose(1, 2) - own.unsqueeze(1) - own.unsqueeze(2)
        best, pair = gain.flatten(1).max(dim=-1)
        more = best > 1e-15
        going, gains, current, pair = going[more], gains[more], current[more], pair[more]
        pair = torch.stack([pair // size, pair % size], dim=-1)
        maps[going] = current.scatter(-1, pair, current.gather(-1, pair.flip(-1)))
    return maps


def maps_of(bijection: Bijection) -> Maps:
    """Finds the maps of a bijection by asking it for those of many logits."""
    num_classes, num_logits = bijection.num_classes, bijection.num_logits

    @torch.no_grad()
    def evaluate(logits: Tensor) -> Tensor:
        maps = []
        for part in logits.split(max(BLOCK // (num_classes * num_logits), 1)):
            classes = torch.arange(num_classes).expand(len(part), -1)
            alike = part.unsqueeze(1).expand(-1, num_classes, -1)
            maps.append(bijection.inverse(classes, alike))
        return torch.cat(maps)

    generator = Generator().manual_seed(0)
    some = torch.rand(64, num_classes, generator=generator).argsort(dim=-1)
    if num_logits == num_classes and torch.equal(evaluate(-some.double()), some):
        return Permutations(num_classes)
    raised = torch.eye(num_logits, dtype=torch.float64)
    raised = (raised.unsqueeze(1) + 2 * raised).flatten(0, 1)
    spread = torch.randn(MOST_LISTED, num_logits, generator=generator, dtype=torch.float64)
    probes = torch.cat([bijection.initial_logits().double() + raised, spread])
    listed, kind = evaluate(probes).unique(dim=0, return_inverse=True)
    first = torch.full((len(listed),), len(probes))
    first = first.scatter_reduce(0, kind, torch.arange(len(probes)), "amin")
    return Listed(listed, probes[first])
