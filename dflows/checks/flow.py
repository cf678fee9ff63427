"""All certificates of a flow."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from dflows.checks.bijectivity import check_bijective
from dflows.checks.causality import check_causal
from dflows.checks.normalization import check_normalized
from dflows.checks.probing import CertificateError, probed, values_of
from dflows.conditioner import Conditioner
from dflows.errors import LengthError, NonFiniteError
from dflows.flow import DiscreteFlow
from dflows.modules import device_of
from dflows.representations import exactly
from dflows.transforms import Composition, DiscreteTransform

__all__ = ["check_flow", "check_shorter"]

CONTEXTS = 8
"""Contexts that are used."""
SHORT = (1, 2, 3)
"""Dimensions of events whose states are enumerated, in addition to full ones."""
MOST_STATES = 1 << 17
MOST_BASE_STATES = 1 << 20
"""States of the base alone, where those are too many for the flow."""
MOST_SECONDS = 1.0


def check_shorter(
    flow: DiscreteFlow, context: Tensor | None = None, *, batch: Tensor | None = None
) -> None:
    """Shows that events of fewer dimensions can be scored, as the last window of a text is.

    One dimension less than the flow's, two, and one are tried. A part that takes no other length,
    as a table does, refuses it by a :class:`~dflows.errors.LengthError` when it meets one, and is
    left to.

    Args:
        flow: The flow.
        context: Encoded contexts, (B, C) or (B, S, C), of which the first is used.
        batch: Data, indices (B, d), whose prefixes are scored; random values by default.

    Raises:
        CertificateError: If one fails.
    """
    lengths = {length for length in (flow.length - 1, 2, 1) if 0 < length < flow.length}
    with probed(flow) as probe:
        context = None if context is None else context[:1]
        for length in sorted(lengths, reverse=True):
            y = values_of(batch, flow.classes, (1, length)).to(device_of(flow))
            try:
                log_prob = probe._log_prob(y, context)
            except LengthError:
                continue
            except NonFiniteError:
                raise
            except Exception as error:
                raise CertificateError(
                    f"an event of {length} dimensions fails where the flow has {flow.length}: "
                    f"{error}; a backbone must take any length up to the flow's, since the last "
                    "window of a text is shorter"
                ) from error
            if log_prob.shape != (1,):
                raise CertificateError(
                    f"the log-probability of an event of {length} dimensions has the shape "
                    f"{tuple(log_prob.shape)} for one example: log_prob of a "
                    f"{type(flow.base).__name__} must return (batch, dimensions)"
                )


def _conditioners(parts: Sequence[nn.Module]) -> dict[Conditioner, int]:
    """Finds networks over orderings, with the lowest level whose output is of use."""
    found: dict[Conditioner, int] = {}
    for owner in nn.ModuleList(parts).modules():
        first = int(isinstance(owner, DiscreteTransform) and owner.ordering is not None)
        for part in owner.children():
            if isinstance(part, Conditioner):
                found[part] = min(first, found.get(part, first))
    return found


def _encode(flow: DiscreteFlow, context: Tensor | None) -> Tensor | None:
    """Encodes some of a batch of contexts, and shows that each is encoded by itself."""
    context = None if context is None else context[:CONTEXTS].clone()
    with probed(flow) as probe:
        encoded = probe.encode_context(context)
        if context is None or encoded is None:
            return encoded
        if not encoded.isfinite().all():
            raise CertificateError(
                "the encoded context is not finite: its encoder must give numbers"
            )
        first = probe.encode_context(context[:1].expand(context.shape))
        if first is None or not torch.allclose(first[0], encoded[0], 1e-4, 1e-5):
            raise CertificateError(
                f"{type(flow.context_encoder).__name__} mixes the contexts of a batch: it must "
                "encode each by itself"
            )
        return encoded


def check_flow(
    flow: DiscreteFlow,
    context: Tensor | None = None,
    *,
    batch: Tensor | None = None,
    trained: bool = False,
    batch_size: int | None = None,
    shorter: bool = True,
) -> None:
    """Runs all certificates on a flow.

    They are the causality of every network of the base and the transforms, from every dimension to
    every other; the bijectivity of every transform, of inverses and of those of one's own, and of
    the stack, on some values (:func:`check_bijective` says which); shorter events; and
    normalization of events of one to three dimensions, and of all, where it can be enumerated.

    They hold for what a flow computes without gradients: in full precision, whatever autocast says,
    or in the half precision that its weights have.

    Neither the flow is changed, nor its mode, nor the random state.

    Args:
        flow: The flow.
        context: A batch of contexts as the flow is called with, of which some are used; needed by
            a conditional flow.
        batch: Data, indices (B, d), whose rows are checked in addition to random values.
        trained: Whether to certify the weights as they are too, before a figure is recorded, not
            shaken ones alone.
        batch_size: Examples that evaluation scores together; as many as `batch` has by default.
        shorter: Whether to certify shorter events too.

    Raises:
        CertificateError: If one fails.
        UserError: If the parts of the flow do not fit each other.
    """
    if batch is not None:
        batch = flow.check_indices(batch)
    if batch_size is None:
        batch_size = 2 if batch is None else len(batch)
    with torch.inference_mode(False), torch.no_grad(), exactly(device_of(flow)):
        batch = None if batch is None else batch.clone()
        encoded = _encode(flow, context)
        for part, first_level in _conditioners([flow.base, *flow.transforms]).items():
            check_causal(
                part,
                encoded if part.takes_context else None,
                first_level=first_level,
                batch=batch,
                trained=trained,
                batch_size=batch_size,
                shorter=shorter,
            )
        check_maps = partial(
            check_bijective,
            num_classes=flow.classes.given,
            batch=batch,
            trained=trained,
        )
        stack = [Composition(flow.transforms)] if len(flow.transforms) > 1 else []
        for transform in [*dict.fromkeys(flow.transforms), *stack]:
            check_maps(transform, encoded, length=flow.length)
        if shorter:
            check_shorter(flow, encoded, batch=batch)
            if flow.transforms and flow.length > 2:
                with suppress(LengthError):
                    whole = Composition(flow.transforms)
                    check_maps(whole, encoded, num_values=0, length=flow.length // 2 + 1)
        for length in SHORT if shorter else ():
            if length < flow.length:
                many = flow.classes.count(length) > MOST_STATES
                check_normalized(
                    flow,
                    encoded,
                    length=length,
                    trained=trained,
                    base_alone=many,
                    max_states=MOST_BASE_STATES if many else MOST_STATES,
                    max_seconds=MOST_SECONDS,
                )
        check_normalized(flow, encoded, trained=trained)
