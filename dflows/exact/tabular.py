"""The best tabular flow of a distribution whose states can be enumerated, without any gradient.

Coordinate ascent over the maps of all contexts (:mod:`dflows.exact.ascent`). What it finds is a
reference for what a bijection and a structure can express, and no bound: it may stop short of the
best.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor

from dflows.backbones import Table
from dflows.bases import AutoregressiveBase, FactorizedBase
from dflows.bijections import Bijection
from dflows.conditioner import Conditioner
from dflows.errors import UserError
from dflows.exact.ascent import Layer, Site, Stack, ascents
from dflows.exact.maps import maps_of
from dflows.exact.measures import check_probabilities
from dflows.flow import DiscreteFlow
from dflows.orderings import Ordering
from dflows.transforms import ConditionalTransform

__all__ = ["TabularFlow", "checked_table", "tabular_flow"]

MOST_TABULAR = 10_000_000
"""States of the largest distribution that a tabular flow is fitted to, in about 2 GB."""


class TabularFlow(NamedTuple):
    """A flow of tables, and the cross-entropies in nats that the ascent ended and began with.

    It begins with every transform fitted by itself, the data's side first, which is what
    :class:`~dflows.objectives.Layerwise` trains.
    """

    flow: DiscreteFlow
    cross_entropy: float
    layerwise: float


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
    table = checked_table(probabilities, bijection)
    for name, value in (("restarts", restarts), ("sweeps", sweeps)):
        if value < 0:
            raise UserError(f"{name} is {value}: give at least 0")
    num_classes, length = table.shape[0], table.ndim
    # Before the ascent, since they refuse what does not fit.
    transforms = [
        ConditionalTransform(
            copy.deepcopy(bijection).double(),
            _conditioner(ordering, num_classes, length, bijection.num_logits),
        )
        for ordering in orderings
    ]
    maps = maps_of(bijection)
    layers = [Layer(ordering, length, maps, num_classes) for ordering in orderings]
    stack = Stack(layers, base, table)
    generator = Generator().manual_seed(seed)
    best, choices, layerwise = math.inf, stack.choices(), math.nan
    for ascent in range(restarts + 1):
        for nats in ascents(stack, sweeps, sweeps // 2 if ascent else 0, generator):
            if math.isnan(layerwise):
                layerwise = nats
            if nats < best:
                best, choices = nats, stack.choices()
    best = stack.finish(choices)
    return TabularFlow(_flow(stack, base, transforms), best, layerwise)


@torch.no_grad()
def _flow(
    stack: Stack, ordering: Ordering | None, transforms: Sequence[ConditionalTransform]
) -> DiscreteFlow:
    """Writes what a stack chose into transforms, and puts them on its base."""
    for transform, layer in zip(transforms, stack.layers, strict=True):
        _write(transform.conditioner, layer.written())
    num_classes, length = stack.table.shape[0], stack.table.ndim
    if ordering is None:
        factorized = FactorizedBase(num_classes, length, sharing="positions").double()
        flow = DiscreteFlow(factorized, transforms)  # which sets the base to its start
        factorized.logits.copy_(torch.cat(stack.conditionals))
        return flow
    conditioner = _conditioner(ordering, num_classes, length, num_classes)
    _write(conditioner, zip(stack.base_sites, stack.conditionals, strict=True))
    return DiscreteFlow(AutoregressiveBase(conditioner), transforms)


def checked_table(probabilities: Tensor, bijection: Bijection) -> Tensor:
    """Returns a table of probabilities on the CPU, that a bijection fits and that is not too large.

    Raises:
        UserError: If it is none.
    """
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


def _conditioner(ordering: Ordering, num_classes: int, length: int, num_logits: int) -> Conditioner:
    """Makes a conditioner whose logits are the rows of a table."""
    table = Table(num_logits, num_classes, length, ordering)
    return Conditioner(num_classes, length, ordering, table, num_logits).double()


def _write(conditioner: Conditioner, written: Iterable[tuple[Site, Tensor]]) -> None:
    """Writes the logits of every context of some dimensions; those of the others are 0."""
    conditioner.head.weight.copy_(torch.eye(conditioner.width))
    conditioner.head.bias.zero_()
    table = cast("Table", conditioner.backbone)
    table.rows.zero_()
    for site, logits in written:
        first = int(table.offsets[site.dimension])
        table.rows[first : first + site.contexts] = logits
