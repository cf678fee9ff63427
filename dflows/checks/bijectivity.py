"""Bijectivity: what a transform makes of values comes back."""

import copy
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from dflows.checks.probing import (
    CertificateError,
    context_rows,
    probed,
    stir,
    values_of,
    variants,
)
from dflows.classes import Classes, NumClasses
from dflows.decoding import decide_levels
from dflows.errors import LengthError, UserError
from dflows.modules import device_of
from dflows.transforms import ConditionalTransform, DiscreteTransform

__all__ = ["check_bijective"]

MOST_PASSES = 64
MOST_LEVELS = 4
MOST_WORK = 1 << 17
"""Values that are evaluated, one pass after the other, to show a round trip of long events."""
STEP = 8
"""Values that one cached step counts as."""
EVENTS = 4
NEAR_TIES = 1e-4
"""Near ties a value that round-off is allowed; 4e-5 were measured in float32 (a Transformer, with
256 classes and dimensions), and 1e-3 to 1e-2 in bfloat16."""
ALIKE = 1e-5
"""How far logits of half-precision features may differ: they are computed in float32."""
REMEDY = "Choose precision 32-true or bf16-mixed, or call .float() on the flow"


def _conditional(transform: DiscreteTransform) -> Iterator[ConditionalTransform]:
    """Finds the conditional transforms that a transform consists of."""
    for part in transform.modules():
        if isinstance(part, DiscreteTransform) and part.ordering is not None:
            yield cast("ConditionalTransform", part)


def _name(transform: DiscreteTransform) -> str:
    if transform.ordering is not None:
        return f"a transform over {transform.ordering!r}"
    if transform.inv.ordering is not None:
        return f"the inverse of a transform over {transform.inv.ordering!r}"
    if len(transform.parts) > 1:
        return f"the stack of {len(transform.parts)} transforms"
    return f"a transform {type(transform).__name__}"


def _shape_of(
    transform: DiscreteTransform, num_classes: NumClasses | None, length: int | None
) -> tuple[Classes, int]:
    classes = None
    for part in _conditional(transform):
        classes, length = part.conditioner.classes, length or part.length
    if num_classes is not None:
        most = (length or 1) if isinstance(num_classes, int) else len(num_classes)
        classes = Classes(num_classes, most)
    if classes is None or length is None:
        raise UserError(f"{_name(transform)} does not tell its shape: give num_classes and length")
    return classes, length


def _work(transform: DiscreteTransform, length: int) -> int:
    """Returns the values of one example that base → data, or an inverse back, goes over."""
    return sum(
        min(part.passes, length) * (STEP if part.conditioner.steps else length)
        for part in _conditional(transform)
    )


def check_bijective(
    transform: DiscreteTransform,
    context: Tensor | None = None,
    num_values: int = 512,
    *,
    num_classes: NumClasses | None = None,
    length: int | None = None,
    batch: Tensor | None = None,
    trained: bool = False,
) -> None:
    """Shows ``inv(transform(x)) == x`` and ``transform(inv(y)) == y`` on random values, y of data.

    They have the transform's own shape where base → data takes 64 passes at most. Where it takes
    more, both are shown on events of 64 dimensions, and the first one on four events of all
    dimensions too, unless that were a matter of minutes: of a network without cached steps it is up
    to some 180 dimensions in a natural order, of one with them up to some 4,000. It is a test and
    no proof: a map that fails on rare values may pass.

    Two logits within round-off of each other may be ordered differently by evaluations of
    different shapes, and the two ways are evaluated in different shapes. An event that does not
    come back is therefore tried again in float64, where there are no such ties: if it does not come
    back there, the map is no bijection. Of those that do, one in 10,000 values is allowed, or one
    alone. Features of half precision must be the same, at once and level by level.

    Args:
        transform: The transform.
        context: Encoded contexts, (B, C) or (B, S, C), which events take in turn.
        num_values: Values that are tried at least, over all dimensions.
        num_classes: K, or one number a dimension, of a transform that holds no conditional one,
            which would tell.
        length: D, likewise.
        batch: Data, indices (B, d), on whose rows it is shown as well as on random ones.
        trained: Whether to show it of the weights as they are too, not of shaken ones alone.

    Raises:
        CertificateError: If values do not come back, or are not values.
        UserError: If the shape is not known.
    """
    classes, length = _shape_of(transform, num_classes, length)
    passes = max(transform.passes, transform.inv.passes)
    shown = min(length, MOST_PASSES) if passes > MOST_PASSES else length
    with probed(transform) as copied:
        for probe, shaken in variants(copied, trained):
            # Few levels choose few maps each time.
            tries = 8 if shaken and passes <= MOST_LEVELS else 1
            trips = _RoundTrips(probe, classes, context)
            number = max(EVENTS, num_values // (tries * shown))
            for attempt in range(tries):
                if attempt:
                    stir(probe)
                else:
                    _check_precision(probe, classes, context, shown)
                try:
                    trips.try_both((number, shown), batch)
                except LengthError:
                    if shown == length:
                        raise
            if shown < length and EVENTS * _work(transform, length) <= MOST_WORK:
                trips.try_values((EVENTS, length))
            trips.close()


def _check_precision(
    transform: DiscreteTransform, classes: Classes, context: Tensor | None, length: int
) -> None:
    """Shows that features of half precision are the same at once and level by level, to the bit.

    Raises:
        CertificateError: If they are not: too many maps would be chosen differently.
    """
    for part in _conditional(transform):
        conditioner = part.conditioner
        device = device_of(part)
        y = values_of(None, classes, (EVENTS, length)).to(device)
        contexts = context_rows(context, EVENTS) if part.takes_context else None
        try:
            hide = None if conditioner.one_pass else torch.ones(1, dtype=torch.long, device=device)
            features = conditioner.features(y, hide, contexts)
        except LengthError:
            continue
        if not features.is_floating_point() or torch.finfo(features.dtype).bits >= 32:
            continue
        expected = conditioner(y, contexts, first_level=1)
        by_levels = torch.zeros_like(expected)

        def note(
            dimensions: Tensor, logits: Tensor, y: Tensor = y, noted: Tensor = by_levels
        ) -> Tensor:
            noted[:, dimensions] = logits
            return y[:, dimensions]

        decide_levels(conditioner, y, note, contexts, first_level=1)
        scale = expected.abs().max()
        if (by_levels - expected).abs().max() > ALIKE * scale:
            kind = str(features.dtype).removeprefix("torch.")
            raise CertificateError(
                f"{_name(part)} is no bijection in this precision: its features are {kind}, and "
                f"those of one evaluation are not those of one a level. {REMEDY}"
            )


class _RoundTrips:
    """Creates a count of the events that came back, and that round-off kept from it.

    Args:
        transform: The transform.
        classes: The classes of the dimensions.
        context: Encoded contexts, which events take in turn.
    """

    def __init__(
        self, transform: DiscreteTransform, classes: Classes, context: Tensor | None
    ) -> None:
        self.transform = transform
        self.classes = classes
        self.context = context
        self.events = self.values = self.near_ties = 0

    def try_both(self, shape: tuple[int, int], batch: Tensor | None) -> None:
        """Tries base → data → base, and data → base → data in inference mode."""
        self.try_values(shape)
        with torch.inference_mode():
            self.try_values(shape, inverted=True)
            if batch is not None:
                self.try_values(shape, batch, inverted=True)

    def try_values(
        self, shape: tuple[int, int], batch: Tensor | None = None, *, inverted: bool = False
    ) -> None:
        """Tries events of a shape (N, d), of random values or of data.

        Raises:
            CertificateError: If they do not come back, in float64 neither.
        """
        transform = self.transform.inv if inverted else self.transform
        device = device_of(transform) if self.context is None else self.context.device
        contexts = context_rows(self.context, shape[0])
        value = values_of(batch, self.classes, shape).to(device)
        missed = self._there_and_back(transform, value, contexts) != value
        self.events += shape[0]
        self.values += value.numel()
        events = missed.any(dim=-1).nonzero().squeeze(-1)
        if not len(events):
            return
        tied = None if contexts is None else contexts[events]
        surely = self._exactly(transform, value[events], tied)
        if surely.any():
            example, dimension = surely.nonzero()[0].tolist()
            failure = "transform(inv(y)) is not y" if inverted else "inv(transform(x)) is not x"
            raise CertificateError(
                f"{_name(self.transform)} is no bijection: {failure} for {int(missed.sum())} of "
                f"{missed.numel()} values, first at dimension {dimension} of example "
                f"{int(events[example])}"
            )
        self.near_ties += len(events)

    def close(self) -> None:
        """Refuses more near ties than full precision has.

        Raises:
            CertificateError: If there are more.
        """
        if self.near_ties > max(NEAR_TIES * self.values, 1):
            raise CertificateError(
                f"{_name(self.transform)} is no bijection in this precision: {self.near_ties} of "
                f"{self.events} events do not come back, and in float64 they do. {REMEDY}"
            )

    def _exactly(
        self, transform: DiscreteTransform, value: Tensor, context: Tensor | None
    ) -> Tensor:
        """Says what values do not come back in float64 either; none, if there is no telling."""
        with torch.inference_mode(False), torch.autocast(value.device.type, enabled=False):
            value = value.clone()
            context = None if context is None else context.double()
            try:
                return (
                    self._there_and_back(copy.deepcopy(transform).double(), value, context) != value
                )
            except CertificateError:
                raise
            except (RuntimeError, TypeError):  # a part that knows no float64
                return torch.zeros_like(value, dtype=torch.bool)

    def _there_and_back(
        self, transform: DiscreteTransform, value: Tensor, context: Tensor | None
    ) -> Tensor:
        """Maps values there, all at once, and back in two batches."""
        there = self._checked(transform(value, context), value, transform)
        first = (len(value) + 1) // 2
        halves = zip(
            there.split(first),
            [None] * 2 if context is None else context.split(first),
            strict=False,
        )
        back = torch.cat([transform.inv(part, own) for part, own in halves])
        return self._checked(back, value, transform)

    def _checked(self, made: Tensor, value: Tensor, transform: DiscreteTransform) -> Tensor:
        if made.shape != value.shape or made.is_floating_point():
            raise CertificateError(
                f"{_name(transform)} makes {tuple(made.shape)} of dtype {made.dtype} of indices "
                f"{tuple(value.shape)}: a transform must return the kind that it was given"
            )
        if not self.classes.contains(made).all():
            most = self.classes.largest - 1
            own = f"outside 0..{most}" if self.classes.each is None else "that dimensions have not"
            raise CertificateError(f"{_name(transform)} makes values {own}")
        return made
