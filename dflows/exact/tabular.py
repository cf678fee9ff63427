"""The best tabular flow of a distribution whose states can be enumerated, without any gradient.

A conditioner that is a table may choose the map of every context apart from all others. From data
to base a transform conditions on its input, so that what one dimension's map does leaves the other
dimensions where they are. Hence, with all else held, the gain of sending class a to class v in
context c is a sum that takes K look-ups a state, and the best map of each context is the one of
the greatest sum of gains. Coordinate ascent goes through the stack by these steps. What it finds is
a reference for what a bijection and a structure can express, and no bound: it may stop short of the
best.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import permutations, product
from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor

from dflows.backbones import Table
from dflows.bases import AutoregressiveBase, FactorizedBase
from dflows.bijections import Bijection
from dflows.conditioner import Conditioner
from dflows.errors import UserError
from dflows.exact.measures import check_probabilities
from dflows.flow import DiscreteFlow
from dflows.orderings import Ordering
from dflows.transforms import ConditionalTransform

__all__ = ["TabularFlow", "exhaustive_optimum", "tabular_flow"]

BLOCK = 2**21
"""Numbers that a step computes at once, which bounds its memory."""

MOST_LISTED = 720
"""Permutations up to which all are scored; of more, a better one is found by swaps."""

MOST_TABULAR = 10_000_000
"""States of the largest distribution that a tabular flow is fitted to, in about 2 GB."""

MOST_PERMUTED = 9
"""States whose bijections are all gone through."""

MOST_REACHED = 1_000_000

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


class _Maps(ABC):
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


class _Listed(_Maps):
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


class _Permutations(_Maps):
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
            return _swapped(gains, choice)
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


def _swapped(gains: Tensor, maps: Tensor) -> Tensor:
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


def _maps_of(bijection: Bijection) -> _Maps:
    """Finds the maps of a bijection by asking it for those of many logits."""
    num_classes, num_logits = bijection.num_classes, bijection.num_logits

    def evaluate(logits: Tensor) -> Tensor:
        classes = torch.arange(num_classes).expand(len(logits), -1)
        with torch.no_grad():
            maps: Tensor = bijection.inverse(
                classes, logits.unsqueeze(1).expand(-1, num_classes, -1)
            )
        return maps

    generator = Generator().manual_seed(0)
    some = torch.rand(64, num_classes, generator=generator).argsort(dim=-1)
    if num_logits == num_classes and torch.equal(evaluate(-some.double()), some):
        return _Permutations(num_classes)
    raised = torch.eye(num_logits, dtype=torch.float64)
    raised = (raised.unsqueeze(1) + 2 * raised).flatten(0, 1)
    spread = torch.randn(MOST_LISTED, num_logits, generator=generator, dtype=torch.float64)
    probes = torch.cat([bijection.initial_logits().double() + raised, spread])
    listed, kind = evaluate(probes).unique(dim=0, return_inverse=True)
    first = torch.full((len(listed),), len(probes))
    first = first.scatter_reduce(0, kind, torch.arange(len(probes)), "amin")
    return _Listed(listed, probes[first])


class _Site:
    """Creates one dimension with those that it depends on.

    Arguments:
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


class _Layer:
    """Creates a transform as the choice of a map for every context of every dimension.

    Arguments:
        ordering: Which dimensions condition which.
        length: D.
        maps: The maps that can be chosen.
        num_classes: K.
    """

    def __init__(self, ordering: Ordering, length: int, maps: _Maps, num_classes: int) -> None:
        levels = ordering.levels(length)
        self.ordering = ordering
        self.maps = maps
        self.sites = [_Site(dimension, levels, num_classes) for dimension in range(length)]
        # The number of the state that each is sent to.
        self.target = torch.zeros((num_classes,) * length, dtype=torch.long)
        for site in self.sites:
            if not levels[site.dimension]:
                site.add(self.target, torch.arange(num_classes) * site.stride)
        self.sites = [site for site in self.sites if levels[site.dimension]]
        self.choices: dict[int, Tensor] = {}

    def _unset(self, site: _Site) -> Tensor:
        choice = self.choices.pop(site.dimension)
        site.add(self.target, -site.stride * self.maps.of(choice))
        return choice

    def _set(self, site: _Site, choice: Tensor) -> None:
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


class _Stack:
    """Creates a stack of layers, base → data, on a base.

    Arguments:
        layers: The layers.
        base: The ordering of the base; none is the factorized base.
        table: The probability of every state, (K,) * D.
    """

    def __init__(self, layers: Sequence[_Layer], base: Ordering | None, table: Tensor) -> None:
        self.layers = layers
        self.table = table
        num_classes, length = table.shape[0], table.ndim
        levels = torch.zeros(length).long() if base is None else base.levels(length)
        self.base_sites = [_Site(dimension, levels, num_classes) for dimension in range(length)]
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
            heat: As in :meth:`_Layer.ascend`.
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


class TabularFlow(NamedTuple):
    """A flow of tables, and the cross-entropies in nats that the ascent ended and began with.

    It begins with every transform fitted by itself, the data's side first, which is what
    :class:`~dflows.estimators.LocalInTurn` trains.
    """

    flow: DiscreteFlow
    cross_entropy: float
    in_turn: float


def tabular_flow(
    probabilities: Tensor,
    orderings: Sequence[Ordering],
    bijection: Bijection,
    *,
    base: Ordering | None = None,
    restarts: int = 1,
    sweeps: int = 40,
    seed: int = 0,
) -> TabularFlow:
    """Finds the best flow of tables by coordinate ascent.

    The first ascent begins with what each transform alone makes of its input, from the data on,
    and goes up and down the stack while that gains anything. Further ones begin alike, and choose
    under noise that cools down during half of their sweeps; of all the best is taken.

    Args:
        probabilities: The probability of every state, (K,) * D, at most ten million.
        orderings: The ordering of each transform, base → data.
        bijection: What is done to one variable. Of one that ranks its logits all permutations are
            considered; of others the maps that result when one or two logits are raised, which are
            all where one or two categorical variables choose the map, and those of random logits.
        base: The ordering of an autoregressive base; the factorized base without one.
        restarts: Ascents after the first.
        sweeps: Most sweeps of an ascent; none leaves the flow as it begins.
        seed: Of all that is drawn.

    Returns:
        The flow, in float64, with :class:`~dflows.backbones.Table` backbones, its cross-entropy in
        nats, and that with which the first ascent began.

    Raises:
        UserError: If `probabilities` is no table of probabilities, has too many states, or another
            number of classes than the bijection; or an argument is out of range.

    Example:
        >>> from dflows.bijections import RankPermutation
        >>> from dflows.orderings import Natural
        >>> probabilities = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
        >>> flow, nats, _ = tabular_flow(probabilities, [Natural()], RankPermutation(2))
        >>> round(nats, 4)
        1.304
        >>> flow.log_prob(torch.tensor([[0, 1], [1, 0]])).exp()
        tensor([0.3500, 0.3500], dtype=torch.float64, grad_fn=<ExpBackward0>)
    """
    table = _checked(probabilities, bijection)
    for name, value in (("restarts", restarts), ("sweeps", sweeps)):
        if value < 0:
            raise UserError(f"{name} is {value}: give at least 0")
    num_classes, length = table.shape[0], table.ndim
    # Before the ascent, since they refuse what does not fit.
    transforms = [_transform(ordering, length, bijection) for ordering in orderings]
    maps = _maps_of(bijection)
    layers = [_Layer(ordering, length, maps, num_classes) for ordering in orderings]
    stack = _Stack(layers, base, table)
    generator = Generator().manual_seed(seed)
    best, choices, in_turn = math.inf, stack.choices(), math.nan
    for ascent in range(restarts + 1):
        for nats in _ascent(stack, sweeps, sweeps // 2 if ascent else 0, generator):
            if math.isnan(in_turn):
                in_turn = nats
            if nats < best:
                best, choices = nats, stack.choices()
    best = stack.finish(choices)
    with torch.no_grad():
        for transform, layer in zip(transforms, layers, strict=True):
            for site in layer.sites:
                logits = maps.logits(layer.choices[site.dimension])
                _write(transform.conditioner, site, logits)
        fitted = _base(base, orderings, num_classes, length)
        for site, logits in zip(stack.base_sites, stack.conditionals, strict=True):
            if isinstance(fitted, AutoregressiveBase):
                _write(fitted.conditioner, site, logits)
            else:
                fitted.logits[site.dimension] = logits[0]
    return TabularFlow(DiscreteFlow(fitted, transforms), best, in_turn)


def _ascent(stack: _Stack, sweeps: int, hot: int, generator: Generator) -> Iterator[float]:
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


def _checked(probabilities: Tensor, bijection: Bijection) -> Tensor:
    table = check_probabilities(probabilities).cpu()
    if table.numel() > MOST_TABULAR:
        raise UserError(
            f"the table has {table.numel():,} probabilities, and a tabular flow takes at most "
            f"{MOST_TABULAR:,}: lower length or num_classes"
        )
    if bijection.num_classes != table.shape[0]:
        raise UserError(
            f"a bijection of {bijection.num_classes} classes meets a table of shape "
            f"{tuple(table.shape)}: give both the same number of classes"
        )
    return table


def _by_table(conditioner: Conditioner) -> None:
    """Makes the features of a table the logits themselves."""
    conditioner.head.weight.copy_(torch.eye(conditioner.width))
    conditioner.head.bias.zero_()


def _transform(ordering: Ordering, length: int, bijection: Bijection) -> ConditionalTransform:
    num_classes = bijection.num_classes
    table = Table(bijection.num_logits, num_classes, length, ordering).double()
    table.rows.data.zero_()
    transform = ConditionalTransform(length, copy.deepcopy(bijection), ordering, table).double()
    with torch.no_grad():
        _by_table(transform.conditioner)
    return transform


def _base(
    base: Ordering | None, orderings: Sequence[Ordering], num_classes: int, length: int
) -> AutoregressiveBase | FactorizedBase:
    if base is None:
        return FactorizedBase(num_classes, length, orderings, sharing="positions").double()
    table = Table(num_classes, num_classes, length, base)
    fitted = AutoregressiveBase(num_classes, length, backbone=table, ordering=base).double()
    _by_table(fitted.conditioner)
    return fitted


def _write(conditioner: Conditioner, site: _Site, logits: Tensor) -> None:
    table = cast("Table", conditioner.backbone)
    first = int(table.offsets[site.dimension])
    table.rows[first : first + site.contexts] = logits


def exhaustive_optimum(
    probabilities: Tensor,
    orderings: Sequence[Ordering] | None = None,
    bijection: Bijection | None = None,
) -> float:
    """Finds the best bijection of all states with a factorized base, by trying every one.

    Args:
        probabilities: The probability of every state, (K,) * D, at most nine.
        orderings: The ordering of each transform, base → data, of the flows to be considered; every
            bijection of the states without them.
        bijection: What these flows do to one variable.

    Returns:
        The smallest cross-entropy in nats that there is.

    Raises:
        UserError: If `probabilities` is no table of probabilities, or there are too many flows.

    Example:
        >>> probabilities = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
        >>> round(exhaustive_optimum(probabilities), 4)
        1.2839
    """
    table = check_probabilities(probabilities).cpu()
    count = table.numel()
    if count > MOST_PERMUTED:
        raise UserError(
            f"the table has {count:,} probabilities, and not all bijections of more than "
            f"{MOST_PERMUTED} states can be tried: use tabular_flow"
        )
    if (orderings is None) != (bijection is None):
        raise UserError("orderings or a bijection was given alone: give both, or none of them")
    if orderings is None or bijection is None:
        targets = torch.tensor(list(permutations(range(count))))
    else:
        targets = _reached(_checked(table, bijection), orderings, _maps_of(bijection))
    pushed = torch.empty(targets.shape, dtype=table.dtype)
    pushed = pushed.scatter_(1, targets, table.flatten().expand_as(pushed))
    num_classes, total = table.shape[0], torch.zeros(len(targets), dtype=table.dtype)
    for dimension in range(table.ndim):
        parts = pushed.reshape(len(targets), num_classes**dimension, num_classes, -1)
        total += torch.special.entr(parts.sum(dim=(1, 3))).sum(dim=-1)
    return float(total.min())


def _reached(table: Tensor, orderings: Sequence[Ordering], maps: _Maps) -> Tensor:
    """Returns the different bijections (n, K^D) that some flow of a stack is, data → base."""
    num_classes, length = table.shape[0], table.ndim
    # Of a single dimension, which no transform changes, there may be too many to be listed.
    listed = torch.empty(0) if maps.listed is None else maps.listed
    reached = torch.arange(table.numel()).unsqueeze(0)
    for ordering in reversed(orderings):
        layer = _Layer(ordering, length, maps, num_classes)
        targets = layer.target.flatten().unsqueeze(0)
        for site in layer.sites:
            each = list(product(range(len(listed)), repeat=site.contexts))
            alone = torch.zeros(len(each), *table.shape, dtype=torch.long)
            for part, choice in zip(alone, each, strict=True):
                site.add(part, site.stride * listed[list(choice)])
            targets = (targets.unsqueeze(1) + alone.flatten(1)).flatten(0, 1)
        if len(targets) * len(reached) > MOST_REACHED:
            raise UserError(
                f"{len(orderings)} transforms of {table.numel()} states make too many flows to try "
                "them all: give fewer orderings, or none for all bijections"
            )
        reached = targets[:, reached].flatten(0, 1).unique(dim=0)
    return reached
