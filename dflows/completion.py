"""Some dimensions of an event given others."""

import torch
from torch import Generator, Tensor

from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.representations import exactly, flatten_batch

__all__ = ["complete", "log_prob_given"]


@torch.no_grad()
def complete(
    flow: DiscreteFlow,
    y: Tensor,
    known: Tensor,
    context: Tensor | None = None,
    *,
    greedy: bool = False,
    generator: Generator | None = None,
) -> Tensor:
    """Draws unknown values given known ones, from their exact distribution.

    That is the one of the ordering which takes the known dimensions first, and then the others as
    the flow's own has it. Every event may have its own known dimensions.

    Args:
        flow: A flow of :func:`dflows.flows.any_order`.
        y: Indices (…, d); values that are not known do not matter.
        known: Which values are known, (…, d) or (d,).
        context: What the flow is conditioned on, (B, …).
        greedy: Whether to take the likeliest values, one after the other, in place of samples.
        generator: Source of randomness.

    Returns:
        Indices (…, d).

    Raises:
        UserError: If the flow has transforms, or its base serves one ordering alone.

    Example:
        >>> from dflows import flows
        >>> flow = flows.any_order(num_classes=3, length=4)
        >>> y, known = torch.tensor([[2, 0, 0, 1]]), torch.tensor([True, False, False, True])
        >>> complete(flow, y, known)[:, [0, 3]]
        tensor([[2, 1]])
    """
    _check_known(y, known)
    flat, known, context, shape = _flattened(flow, y.where(known, 0), known, context)
    noise = None if greedy else flow.base.noise(len(flat), flat.shape[1], generator)
    with exactly(flat.device):
        found = flow.base.complete(flat, known, context, noise)
    return found.reshape(shape + found.shape[1:])


@torch.no_grad()
def log_prob_given(
    flow: DiscreteFlow, y: Tensor, known: Tensor, context: Tensor | None = None
) -> Tensor:
    """Computes the log-probability of every unknown value given the known ones, in nats.

    Args:
        flow: As in :func:`complete`.
        y: Indices (…, d).
        known: Which values are known, (…, d) or (d,).
        context: As in :func:`complete`.

    Returns:
        Log-probabilities (…, d), 0 where a value is known. Their sum is the exact conditional
        log-probability of the unknown values, in the distribution that :func:`complete` draws from.

    Raises:
        UserError: As :func:`complete`.

    Example:
        >>> from dflows import flows
        >>> flow = flows.any_order(num_classes=3, length=4)
        >>> y, known = torch.tensor([2, 0, 0, 1]), torch.tensor([True, False, False, True])
        >>> log_prob_given(flow, y, known)[known]
        tensor([0., 0.])
    """
    _check_known(y, known)
    flat, known, context, shape = _flattened(flow, y, known, context)
    with exactly(flat.device):
        terms = flow.base.log_prob_given(flat, known, context)
    return terms.reshape(shape + terms.shape[1:])


def _check_known(y: Tensor, known: Tensor) -> None:
    if known.dtype != torch.bool or known.shape not in (y.shape, y.shape[-1:]):
        raise UserError(
            f"known is {known.dtype} of shape {tuple(known.shape)}: give a boolean for every "
            f"value, {tuple(y.shape)}, or for every dimension"
        )


def _flattened(
    flow: DiscreteFlow, y: Tensor, known: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, torch.Size]:
    """Returns events (N, d), which of their values are known, contexts, and the batch shape."""
    if len(flow.transforms):
        raise UserError(
            "values given others were asked for, and transforms mix dimensions: train a flow of "
            "dflows.flows.any_order"
        )
    flat, context, shape = flatten_batch(flow.check_indices(y), flow.encode_context(context))
    return flat, known.to(y.device).expand(y.shape).reshape(flat.shape), context, shape
