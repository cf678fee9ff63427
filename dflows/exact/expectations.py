r"""What is expected of a flow whose maps are sampled, exactly.

Let every transform of a flow sample the map of every dimension from the softmax of its logits, as
:class:`~dflows.gradients.ReinMax` does, so that data y lead to x with a probability
:math:`P(x \mid y)`. End to end, the gradient of a softmax straight-through rule stands for a
softmax of the rule's own temperature, and all others for that of temperature 1. Two functions then
have gradients:

.. math::

    J = \sum_y p(y) \sum_x P(x \mid y) \log q(x), \qquad
    L = \sum_y p(y) \log \sum_x P(x \mid y)\, q(x).

Straight-through rules estimate the gradient of the expected log-likelihood J, the posterior rule
that of the log-likelihood L of the mixture. Where all states can be enumerated both are computed
here without an estimate, and differentiated by autograd: :math:`P` is a product of Markov kernels,
one a transform, and each kernel a product over dimensions of the distributions of :math:`x_d` given
y. Its :math:`K^{2D}` entries are never held.
"""

import copy
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dflows.bijections import SoftmaxBijection
from dflows.errors import UserError
from dflows.exact.measures import check_alike, states
from dflows.flow import DiscreteFlow
from dflows.representations import to_one_hot
from dflows.transforms import ConditionalTransform, DiscreteTransform

__all__ = ["expected_log_likelihood", "mixture_log_likelihood", "states_of"]

BLOCK_ENTRIES = 2**22
"""Largest number of entries that a kernel is contracted over at once: 32 MB."""


def _maps(bijection: SoftmaxBijection) -> tuple[Tensor, Tensor]:
    """Tabulates all maps of a bijection.

    Returns:
        The choices (C, number of choices) that make each map, and the x (C, K) of every y.
    """
    parts = bijection.choice_logits(bijection.initial_logits())
    possible = [part.isfinite().nonzero()[:, 0] for part in parts]
    choices = torch.cartesian_prod(*possible).reshape(-1, len(possible))
    y = torch.arange(bijection.num_classes).expand(len(choices), -1)
    chosen = tuple(choice.unsqueeze(-1).expand(y.shape) for choice in choices.T)
    return choices, bijection.map_by(y, chosen, inverse=True)


def _kernel(bijection: SoftmaxBijection, y: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Computes the distributions (N, d, K) of x, given y (N, d) and logits (N, d, num_logits)."""
    choices, table = _maps(copy.deepcopy(bijection).cpu())
    choices, table = choices.to(y.device), table.to(y.device)
    log_probs = logits.new_zeros((), dtype=torch.float64)
    for part, chosen in zip(bijection.choice_logits(logits), choices.T, strict=True):
        part = part.double() / temperature
        log_probs = log_probs + part.log_softmax(dim=-1)[..., chosen]
    zeros = log_probs.new_zeros(*y.shape, bijection.num_classes)
    return zeros.scatter_add(-1, table.T[y], log_probs.exp())


def _expect(values: Tensor, kernel: Tensor) -> Tensor:
    """Computes the means (N,) of values (K^D,) under distributions (N, D, K)."""
    rows, length, num_classes = kernel.shape
    means = values.reshape(-1, num_classes) @ kernel[:, -1].T
    for dimension in reversed(range(length - 1)):
        means = (means.reshape(-1, num_classes, rows) * kernel[:, dimension].T).sum(dim=1)
    return means.reshape(rows)


def _before(
    transform: ConditionalTransform, temperature: float | None, y: Tensor, values: Tensor
) -> Tensor:
    """Computes the means (N,) of values (K^D,) over what y (N, D) is before a transform."""
    bijection = cast("SoftmaxBijection", transform.bijection)
    if temperature is None:
        temperature = bijection.rule.choice_temperature
    kernel = to_one_hot(y, bijection.num_classes, torch.float64)
    dimensions = transform.transformed(y)
    logits = transform.logits(y, dimensions)
    sampled = _kernel(bijection, y[:, dimensions], logits, temperature)
    return _expect(values, kernel.index_copy(1, dimensions, sampled))


def _check_samples(transform: DiscreteTransform) -> None:
    """Refuses a transform whose maps cannot be sampled and enumerated.

    Raises:
        UserError: If they cannot.
    """
    if transform.ordering is None:
        if any(True for _ in transform.parameters()):
            raise UserError(
                f"the maps of a {type(transform).__name__} cannot be enumerated: give a stack of "
                "conditional transforms and permutations"
            )
        return
    bijection = cast("ConditionalTransform", transform).bijection
    if not isinstance(bijection, SoftmaxBijection):
        raise UserError(
            f"{type(bijection).__name__} does not choose its map by a softmax, so that none can "
            "be sampled: give ModularShift or ModularAffine"
        )


def _through_all(
    flow: DiscreteFlow, values: Tensor, y: Tensor, temperature: float | None
) -> Tensor:
    """Carries values of all x, (K^D,), to their means given each y."""
    powers = flow.num_classes ** torch.arange(flow.length - 1, -1, -1, device=y.device)
    rows = max(1, BLOCK_ENTRIES * flow.num_classes // len(y))
    for transform in flow.transforms:
        _check_samples(transform)
        if transform.ordering is None:
            values = values[(transform.inverse(y) * powers).sum(dim=-1)]
            continue
        before = partial(_before, cast("ConditionalTransform", transform), temperature)
        blocks = y.split(rows)
        if len(blocks) == 1:
            values = before(y, values)
        else:
            parts = [checkpoint(before, block, values, use_reentrant=False) for block in blocks]
            values = torch.cat(parts)
    return values


def states_of(flow: DiscreteFlow) -> Tensor:
    """Returns all states (K^D, D) of a flow, on its device.

    Raises:
        UserError: If its dimensions have different numbers of classes.
    """
    check_alike(flow)
    return states(flow.num_classes, flow.length).to(next(flow.parameters()).device)


def expected_log_likelihood(flow: DiscreteFlow, temperature: float | None = None) -> Tensor:
    r"""Computes :math:`\sum_x P(x \mid y) \log q(x)` of every state y.

    Its gradient is exact. For one in double precision give a flow in double precision.

    Args:
        flow: A flow without context whose states can be enumerated, in thousands.
        temperature: That of the softmax that maps are sampled from; by default, for each bijection,
            the one that the gradient of its rule stands for.

    Returns:
        Expected log-likelihoods (K^D,), float64, in the order of :func:`dflows.exact.states`.

    Raises:
        UserError: If a map of the flow cannot be sampled, or there are too many states.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from dflows import flows
        >>> from dflows.bijections import ModularAffine
        >>> flow = flows.bipartite(3, 2, bijection=ModularAffine)
        >>> expected = expected_log_likelihood(flow)
        >>> expected.shape, bool((expected < mixture_log_likelihood(flow) + 1e-9).all())
        (torch.Size([9]), True)
        >>> round(mixture_log_likelihood(flow).exp().sum().item(), 6)
        1.0
    """
    y = states_of(flow)
    return _through_all(flow, flow.base.log_prob(y).sum(dim=-1).double(), y, temperature)


def mixture_log_likelihood(flow: DiscreteFlow, temperature: float | None = None) -> Tensor:
    r"""Computes :math:`\log \sum_x P(x \mid y)\, q(x)` of every state y.

    Arguments, result and errors are those of :func:`expected_log_likelihood`.
    """
    y = states_of(flow)
    probs = flow.base.log_prob(y).sum(dim=-1).double().exp()
    return _through_all(flow, probs, y, temperature).log()
