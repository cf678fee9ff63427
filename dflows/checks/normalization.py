"""Normalization: probabilities sum to 1, and no likelihood is above the entropy's."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dflows.checks.probing import CertificateError, context_rows, probed, variants
from dflows.classes import Classes
from dflows.errors import LengthError
from dflows.flow import DiscreteFlow
from dflows.modules import device_of
from dflows.representations import exactly

__all__ = ["check_above_entropy", "check_normalized"]

BLOCK = 4096
TOO_MUCH = 1e-3


def check_normalized(
    flow: DiscreteFlow,
    context: Tensor | None = None,
    *,
    length: int | None = None,
    trained: bool = False,
    base_alone: bool = False,
    max_states: int = 1_000_000,
    max_seconds: float = 5.0,
    tolerance: float = 1e-5,
) -> float | None:
    """Shows that the probabilities of all states sum to 1.

    Args:
        flow: The flow.
        context: Encoded contexts, (B, C) or (B, S, C), of which the first is used.
        length: Dimensions of the states; D by default.
        trained: Whether to show it of the weights as they are too, not of shaken ones alone.
        base_alone: Whether to show it of the base, without the transforms.
        max_states: The most states to enumerate.
        max_seconds: Time after which the enumeration is given up, unless the sum is above 1 then.
        tolerance: How far from 1 the sum may be.

    Returns:
        The sum, or nothing where there are too many states or too little time, or the flow takes no
        events of this length.

    Raises:
        CertificateError: If the sum is not 1.
    """
    length = flow.length if length is None else length
    states = flow.classes.count(length)
    if states > max_states:
        return None
    total: float | None = None
    with probed(flow) as copied:
        for probe, _ in variants(copied, trained):

            def of_flow(y: Tensor, context: Tensor | None, probe: DiscreteFlow = probe) -> Tensor:
                return probe._log_prob(y, context)

            def of_base(x: Tensor, context: Tensor | None, probe: DiscreteFlow = probe) -> Tensor:
                with exactly(x.device):
                    return probe.base.log_prob(x, context).sum(dim=-1)

            def sum_of(log_prob: Callable[[Tensor, Tensor | None], Tensor]) -> float | None:
                return _sum(log_prob, flow.classes, length, device_of(flow), context, max_seconds)

            try:
                total = sum_of(of_base if base_alone else of_flow)
            except LengthError:
                return None
            if total is None:
                return None
            if not abs(total - 1) <= tolerance:
                base = sum_of(of_base) if flow.transforms and not base_alone else total
                wrong = base is None or not abs(base - 1) <= tolerance
                blamed = (
                    f"the base {type(flow.base).__name__} is not normalized, its log_prob is wrong"
                    if wrong
                    else "the base's do, so a transform is no bijection"
                )
                raise CertificateError(
                    f"the probabilities of all {states} states of {length} dimensions sum to "
                    f"{total:.6f} and not to 1: {blamed}"
                )
    return total


def _sum(
    log_prob: Callable[[Tensor, Tensor | None], Tensor],
    classes: Classes,
    length: int,
    device: torch.device,
    context: Tensor | None,
    max_seconds: float,
) -> float | None:
    """Sums the probabilities of all states of d dimensions, in blocks that round alike."""
    states = classes.count(length)
    rows = min(BLOCK, states)
    contexts = None if context is None else context_rows(context[:1], rows)
    begin, total = time.monotonic(), 0.0
    for block in torch.arange(states, device=device).split(rows):
        padded = torch.cat([block, block[:1].expand(rows - len(block))])
        y = classes.states(padded, length)
        total += log_prob(y, contexts)[: len(block)].double().exp().sum().item()
        if time.monotonic() - begin > max_seconds and block[-1] < states - 1:
            # No more could bring it back to 1.
            return total if total > 1 + TOO_MUCH else None
    return total


def check_above_entropy(nll: float, entropy: float, standard_error: float = 0.0) -> None:
    """Shows that a negative log-likelihood is not below the entropy of the data.

    Args:
        nll: Mean negative log-likelihood, in nats.
        entropy: Entropy of the data's distribution, in nats.
        standard_error: Of the mean; four of them are allowed.

    Raises:
        CertificateError: If it is below, which no distribution can be, or is no number.

    Example:
        >>> check_above_entropy(nll=7.7, entropy=7.6)
    """
    if not nll >= entropy - 4 * standard_error - 1e-6 * max(abs(entropy), 1):
        raise CertificateError(
            f"the negative log-likelihood of {nll:.6f} nats is below the entropy of the data, "
            f"{entropy:.6f}: it is no likelihood"
        )
