"""Coordinate ascent over the maps of a stack of tables.

A conditioner that is a table may choose the map of every context apart from all others. From data
to base a transform conditions on its input, so that what one dimension's map does leaves the other
dimensions where they are. Hence, with all else held, the gain of sending class a to class v in
context c is a sum that takes K look-ups a state, and the best map of each context is the one of
the greatest sum of gains. Coordinate ascent goes through the stack by these steps.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from dflows.exact.maps import BLOCK, Maps
from dflows.orderings import Ordering

__all__ = ["Layer", "Site", "Stack", "ascents"]

TRIES = 5
"""Random distributions that the greedy fit of a dimension begins with."""

HEAVIEST = 4096
"""Contexts on which the best of these is found."""

HEAT = 0.01
"""Noise at the start of an ascent that cools, in standard deviations of a context's gains."""

GAIN = 1e-6
"""Nats that a step or sweep must gain for another to follow."""

FLOOR = 1e-12
"""Smallest probability of a base's class during the ascent, so that an empty one can be filled."""

TINY = 1e-300
"""The same at the end."""


class Site:
    """Creates one dimension with those that it depends on.

    Args:
        dimension: The dimension.
        levels: The levels (D,) of all dimensions.
        num_classes: K.
    """

    def __init__(self, dimension: int, levels: Tensor, num_classes: int) -> None:
        lower = (levels < levels[dimension]).nonzero().flatten().tolist()
        rest = [d for d in range(len(levels)) if d != dimension and d not in lower]
        self.dimension = dimension
        self.stride: int = num_classes ** (len(levels) - 1 - dimension)
        self.num_classes = num_classes
        # As in `Table`, the first of the lower dimensions runs first.
        self.order = [*reversed(lower), dimension, *rest]
        self.contexts: int = num_classes ** len(lower)
        self.shape = (num_classes,) * (len(lower) + 1) + (1,) * len(rest)

    def by_context(self, table: Tensor) -> Tensor:
        """Rearranges a table (K,) * D into (C·K, rest): contexts and classes, and all the rest."""
        return table.permute(self.order).reshape(self.contexts * self.num_classes, -1)

    def total(self, table: Tensor) -> Tensor:
        """Sums up a table over the rest: (C, K)."""
        return self.by_context(table).sum(dim=-1).reshape(self.contexts, self.num_classes)

    def add(self, table: Tensor, values: Tensor) -> None:
        """Adds values (C, K) to a table (K,) * D, in place."""
        table.permute(self.order).add_(values.reshape(self.shape))

    def gains(self, table: Tensor, target: Tensor, log_probs: Tensor) -> Tensor:
        """Computes the gain (C, K, K) of sending a class to another.

        Args:
            table: The probability of every input, (K,) * D.
            target: The number of the state that it is sent to, with 0 in this dimension.
            log_probs: The log-probability of every state, (K,) * D.
        """
        num_classes, stride = self.num_classes, self.stride
        rows = log_probs.reshape(-1, num_classes, stride).transpose(1, 2).reshape(-1, num_classes)
        number = target // (stride * num_classes) * stride + target % stride
        weights, number = self.by_context(table), self.by_context(number)
        size = max(BLOCK // (weights.shape[1] * num_classes), 1)
        parts = zip(weights.split(size), number.split(size), strict=True)
        gains = torch.cat([(w.unsqueeze(1) @ rows[n]).squeeze(1) for w, n in parts])
        return gains.reshape(self.contexts, num_classes, num_classes)


class Layer:
    """Creates a transform as the choice of a map for every context of every dimension.

    Args:
        ordering: Which dimensions condition which.
        length: D.
        maps: The maps that can be chosen.
        num_classes: K.
    """

    def __init__(self, ordering: Ordering, length: int, maps: Maps, num_classes: int) -> None:
        levels = ordering.levels(length)
        self.ordering = ordering
        self.maps = maps
        self.sites = [Site(dimension, levels, num_classes) for dimension in range(length)]
        # The number of the state that each is sent to.
        self.target = torch.zeros((num_classes,) * length, dtype=torch.long)
        for site in self.sites:
            if not levels[site.dimension]:
                site.add(self.target, torch.arange(num_classes) * site.stride)
        self.sites = [site for site in self.sites if levels[site.dimension]]
        self.choices: dict[int, Tensor] = {}

    def _unset(self, site: Site) -> Tensor:
        choice = self.choices.pop(site.dimension)
        site.add(self.target, -site.stride * self.maps.of(choice))
        return choice

    def _set(self, site: Site, choice: Tensor) -> None:
        if site.dimension in self.choices:
            self._unset(site)
        site.add(self.target, site.stride * self.maps.of(choice))
        self.choices[site.dimension] = choice

    def pull(self, table: Tensor) -> Tensor:
        """Returns a table over outputs as one over inputs."""
        return table.flatten()[self.target.flatten()].reshape(table.shape)

    def push(self, table: Tensor) -> Tensor:
        """Returns a table over inputs as one over outputs."""
        moved = torch.empty_like(table).flatten()
        moved[self.target.flatten()] = table.flatten()
        return moved.reshape(table.shape)

    def restore(self, choices: dict[int, Tensor]) -> None:
        """Makes choices that were made before."""
        for site in self.sites:
            self._set(site, choices[site.dimension])

    def written(self) -> Iterator[tuple[Site, Tensor]]:
        """Returns the dimensions, and the logits (C, num_logits) that choose the maps of each."""
        for site in self.sites:
            yield site, self.maps.logits(self.choices[site.dimension])

    def fit_alone(self, table: Tensor, generator: Generator) -> None:
        """Chooses maps that make the entropies of the outputs small, one dimension at a time.

        Args:
            table: The probability of every input, (K,) * D.
            generator: Source of the distributions of the output to begin with.
        """
        for site in self.sites:
            weights = site.total(table)
            # What to begin with is found on the contexts that matter most.
            heaviest = weights.sum(dim=-1).topk(min(HEAVIEST, len(weights))).indices
            begin = 2 * torch.randn(TRIES, site.num_classes, generator=generator).double()
            tried = [self._alone(weights[heaviest], log_probs) for log_probs in begin]
            _, _, log_probs = min(tried, key=lambda found: found[0])
            self._set(site, self._alone(weights, log_probs)[1])

    def _alone(self, weights: Tensor, log_probs: Tensor) -> tuple[float, Tensor, Tensor]:
        """Goes back and forth between maps and the distribution of the output.

        Returns:
            The entropy of the output, the maps, and the log-probabilities (K,) that they came of.
        """
        best, choice, of = math.inf, torch.empty(0), log_probs
        while True:
            candidate = self.maps.best_alone(weights, log_probs)
            probs = weights.new_zeros(len(log_probs))
            probs.index_add_(0, self.maps.of(candidate).flatten(), weights.flatten())
            probs /= probs.sum()
            entropy = float(torch.special.entr(probs).sum())
            if not entropy < best - GAIN:
                return best, choice, of
            best, choice, of = entropy, candidate, log_probs
            log_probs = probs.clamp(min=FLOOR).log()

    def ascend(self, table: Tensor, log_probs: Tensor, heat: float, generator: Generator) -> None:
        """Chooses the best maps, one dimension after the other.

        Args:
            table: The probability of every input, (K,) * D.
            log_probs: The log-probability of every output, (K,) * D.
            heat: Noise on the gains, in their standard deviations.
            generator: Source of the noise.
        """
        for site in self.sites:
            choice = self._unset(site)
            gains = site.gains(table, self.target, log_probs)
            if heat:
                noise = torch.randn(gains.shape, generator=generator, dtype=gains.dtype)
                gains += noise * heat * gains.std(dim=(1, 2), keepdim=True)
            self._set(site, self.maps.best(gains, choice))


class Stack:
    """Creates a stack of layers, base → data, on a base.

    Args:
        layers: The layers.
        base: The ordering of the base; none is the factorized base.
        table: The probability of every state, (K,) * D.
    """

    def __init__(self, layers: Sequence[Layer], base: Ordering | None, table: Tensor) -> None:
        self.layers = layers
        self.table = table
        num_classes, length = table.shape[0], table.ndim
        levels = torch.zeros(length).long() if base is None else base.levels(length)
        self.base_sites = [Site(dimension, levels, num_classes) for dimension in range(length)]
        self.conditionals: list[Tensor] = []

    def fit_base(self, table: Tensor, floor: float) -> Tensor:
        """Fits the base to a table over its values, and returns their log-probabilities."""
        self.conditionals.clear()
        log_probs = torch.zeros_like(table)
        for site in self.base_sites:
            total = site.total(table)
            mass = total.sum(dim=-1, keepdim=True)
            probs = torch.where(mass > 0, total / mass, 1 / site.num_classes)
            self.conditionals.append(probs.clamp(min=floor).log().log_softmax(dim=-1))
            site.add(log_probs, self.conditionals[-1])
        return log_probs

    def begin(self, generator: Generator) -> tuple[float, Tensor]:
        """Fits one layer after the other as if the base were right beneath, from the data on.

        Returns:
            The cross-entropy, and the distribution of the base's values.
        """
        table = self.table
        for layer in reversed(self.layers):
            layer.fit_alone(table, generator)
            table = layer.push(table)
        return self._value(table, FLOOR), table

    def sweep(self, table: Tensor, heat: float, generator: Generator) -> tuple[float, Tensor]:
        """Ascends from the base to the data and back, and fits the base before and after.

        Args:
            table: The distribution of the base's values.
            heat: As in :meth:`Layer.ascend`.
            generator: Source of the noise.

        Returns:
            The cross-entropy, and the new distribution of the base's values.
        """
        log_probs = self.fit_base(table, FLOOR)
        for layer in self.layers:
            table = layer.pull(table)
            layer.ascend(table, log_probs, heat, generator)
            log_probs = layer.pull(log_probs)
        for layer in reversed(self.layers):
            log_probs = layer.push(log_probs)
            if layer is not self.layers[-1]:
                layer.ascend(table, log_probs, heat, generator)
            table = layer.push(table)
        return self._value(table, FLOOR), table

    def _value(self, table: Tensor, floor: float) -> float:
        return -float((table * self.fit_base(table, floor)).sum())

    def choices(self) -> list[dict[int, Tensor]]:
        """Returns the choices of every layer."""
        return [dict(layer.choices) for layer in self.layers]

    def finish(self, choices: Sequence[dict[int, Tensor]]) -> float:
        """Takes choices that were made before, and returns the cross-entropy with the best base."""
        table = self.table
        for layer, choice in zip(reversed(self.layers), reversed(choices), strict=True):
            layer.restore(choice)
            table = layer.push(table)
        return self._value(table, TINY)


def ascents(stack: Stack, sweeps: int, hot: int, generator: Generator) -> Iterator[float]:
    """Ascends, and yields the cross-entropy at the start and after every sweep."""
    value, table = stack.begin(generator)
    yield value
    for sweep in range(sweeps):
        heat = HEAT * max(1 - sweep / max(hot, 1), 0) if hot else 0.0
        before = value
        value, table = stack.sweep(table, heat, generator)
        yield value
        if not heat and before - value < GAIN:
            return
