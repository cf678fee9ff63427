"""Certificates: what a flow must be before training time is spent on it.

A flow's likelihood is exact only if its transforms are bijective, its networks keep to their
orderings, and its probabilities sum to 1. The checks here look for what is not so, on the flow's
own shapes as far as that takes seconds. They probe a copy whose parameters are shaken, since at
initialisation a flow is the identity and hides what its network does.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from dflows.backbones import Backbone
from dflows.conditioner import Conditioner
from dflows.decoding import decide_levels
from dflows.errors import LengthError, UserError
from dflows.flow import DiscreteFlow
from dflows.orderings import Natural, Ordering
from dflows.representations import repeat_context
from dflows.transforms import Composition, ConditionalTransform, DiscreteTransform, Inverse

__all__ = [
    "CertificateError",
    "check_above_entropy",
    "check_autoregressive",
    "check_bijective",
    "check_causal",
    "check_flow",
    "check_normalized",
    "check_shorter",
]

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)

MOST_VALUES = 8192
MOST_LEVELS = 4
MOST_PASSES = 64
MOST_WORK = 1 << 17
"""Values that are evaluated, one pass after the other, to show a round trip of long events."""
STEP = 8
"""Values that one cached step counts as."""
EVENTS = 4
NEAR_TIES = 1e-2


def _device(module: nn.Module) -> torch.device:
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


class CertificateError(UserError):
    """A flow that is not what its likelihood presumes, with where it shows."""


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Evaluates without gradients or dropout, and leaves mode and random state as they were."""
    training = [(part, part.training) for part in module.modules()]
    device = _device(module)
    devices = [device] if device.type == "cuda" else []
    try:
        module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            yield
    finally:
        for part, mode in training:
            part.training = mode


def _shaken(module: _ModuleT) -> _ModuleT:
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return _stirred(module)


def _stirred(module: _ModuleT) -> _ModuleT:
    """Changes features and logits, in place, so that other maps are chosen."""
    for part in module.modules():
        if isinstance(part, Conditioner):
            part.head.weight.add_(torch.randn_like(part.head.weight), alpha=part.width**-0.5)
            if part.embedding.embeds:
                part.embedding.query.add_(torch.randn_like(part.embedding.query))
    return module


def _for_rows(context: Tensor | None, rows: int) -> Tensor | None:
    return None if context is None else repeat_context(context[:1], rows)


def _name(conditioner: Conditioner) -> str:
    return f"backbone {type(conditioner.backbone).__name__} over {conditioner.ordering!r}"


def _evaluate(
    conditioner: Conditioner, y: Tensor, context: Tensor | None, first_level: int = 0
) -> Tensor:
    """Evaluates all levels, of a masked network a few, and says which backbone failed."""
    members = conditioner.layout(y.shape[1], y.device).members
    try:
        if conditioner.one_pass:
            return conditioner.features(y, None, context)
        some = slice(first_level, first_level + MOST_LEVELS)
        hidden = [torch.full((1,), level, device=y.device) for level in range(len(members))[some]]
        features = [conditioner.features(y, level, context) for level in hidden]
        return torch.cat(features, dim=1)
    except UserError:
        raise
    except Exception as error:
        raise CertificateError(
            f"{_name(conditioner)} failed on features "
            f"({y.shape[0]}, {y.shape[1]}, {conditioner.width}): {error}"
        ) from error


def _first_change(before: Tensor, after: Tensor) -> tuple[int, ...] | None:
    scale = before.abs().max().clamp(min=1)
    changed = ((before - after).abs() > 1e-6 * scale).nonzero()
    return tuple(changed[0].tolist()) if len(changed) else None


def check_causal(
    conditioner: Conditioner, context: Tensor | None = None, *, first_level: int = 0
) -> None:
    """Shows that a network's output at a dimension depends on lower levels and nothing else.

    A network that keeps to the ordering by itself is shown to at every level: by steps that are
    handed no more than lower levels where it has them, and else by changing, for one level after
    the other, all values of this and of higher levels.

    Args:
        conditioner: The network with its ordering.
        context: One encoded context, (1, C) or (1, S, C).
        first_level: The lowest level whose output is of use, 1 in a transform.

    Raises:
        CertificateError: If it depends on a value of its own or a higher level, on another example
            of the batch, or on chance; with the first place that shows it.
    """
    length, device = conditioner.length, conditioner.head.weight.device
    with _quiet(conditioner):
        probed = _shaken(conditioner)
        y = torch.randint(probed.num_classes, (1, length), device=device)
        batch = y.repeat(2, 1)
        # One context for all rows: else rows would differ for a good reason.
        contexts = _for_rows(context, 2)
        before = _evaluate(probed, batch, contexts, first_level)
        if not before.isfinite().all():
            raise CertificateError(
                f"{_name(probed)} returns features that are not finite, first at dimension "
                f"{int((~before.isfinite()).nonzero()[0, 1]) % length}: its outputs must be numbers"
            )
        if _first_change(before, _evaluate(probed, batch, contexts, first_level)) is not None:
            raise CertificateError(
                f"{_name(probed)} gives another result when it is evaluated again: it must be "
                "deterministic in evaluation mode"
            )
        other = batch.clone()
        other[1:] = (other[1:] + 1) % probed.num_classes
        if (
            where := _first_change(before[:1], _evaluate(probed, other, contexts, first_level)[:1])
        ) is not None:
            raise CertificateError(
                f"{_name(probed)} mixes the examples of a batch, seen at dimension "
                f"{where[1] % length}: the features are (batch, length, width); a torch "
                "Transformer needs batch_first: true, and batch normalization cannot be used"
            )
        if not probed.one_pass:
            return  # what is masked cannot leak
        if probed.steps:
            _check_steps(probed, y, context, first_level)
        else:
            _check_levels(probed, y, context, first_level)


def _check_steps(
    conditioner: Conditioner, y: Tensor, context: Tensor | None, first_level: int
) -> None:
    """Compares one evaluation with steps, which never see what they must not."""
    exact = copy.deepcopy(conditioner).double()
    steps = torch.zeros(1, y.shape[1], exact.num_logits, dtype=torch.double, device=y.device)

    def note(dimensions: Tensor, logits: Tensor) -> Tensor:
        steps[:, dimensions] = logits
        return y[:, dimensions]

    decide_levels(exact, y, note, context, first_level=first_level)
    where = _first_change(steps, exact(y, context, first_level=first_level))
    if where is not None:
        _check_levels(conditioner, y, context, first_level)
        raise CertificateError(
            f"{_name(conditioner)} computes other logits by steps than in one evaluation, first at "
            f"dimension {where[1]}: `begin` and `advance` must give what `forward` does"
        )


def _check_levels(
    conditioner: Conditioner, y: Tensor, context: Tensor | None, first_level: int
) -> None:
    """Changes all values from one level on, a row for every level, and looks at those below."""
    levels, members, *_ = conditioner.layout(y.shape[1], y.device)
    tried = torch.arange(first_level, len(members), device=y.device)
    rows = min(len(tried), max(MOST_VALUES // y.shape[1], 2))
    batch, contexts = y.repeat(rows, 1), _for_rows(context, rows)
    before = _evaluate(conditioner, batch, contexts)
    needed = levels >= first_level
    for chunk in tried.split(rows):
        # Rows of equal number and place are rounded alike.
        begin = torch.cat([chunk, chunk[-1:].expand(rows - len(chunk))]).unsqueeze(-1)
        changed = torch.where(levels >= begin, (batch + 1) % conditioner.num_classes, batch)
        after = _evaluate(conditioner, changed, contexts)
        forbidden = ((levels <= begin) & needed).unsqueeze(-1)
        where = _first_change(before * forbidden, after * forbidden)
        if where is not None:
            row, target = where[:2]
            source = _source(conditioner, y[0], changed[row], target, context)
            raise CertificateError(
                f"{_name(conditioner)} leaks: the value at dimension {source} (level "
                f"{int(levels[source])}) changes the output at dimension {target} (level "
                f"{int(levels[target])}), which may depend on lower levels only"
            )


def _source(
    conditioner: Conditioner, y: Tensor, changed: Tensor, target: int, context: Tensor | None
) -> int:
    """Finds, by bisection, one of the changed values that changes the output at a dimension."""
    suspects, contexts = (y != changed).nonzero().squeeze(-1), _for_rows(context, 2)
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        tried = y.clone()
        tried[half] = changed[half]
        features = _evaluate(conditioner, torch.stack([y, tried]), contexts)
        if _first_change(features[:1, target], features[1:, target]) is not None:
            suspects = half
        else:  # the change comes on top of these
            y, suspects = tried, suspects[len(half) :]
    return int(suspects)


def check_autoregressive(
    backbone: Backbone, length: int = 16, ordering: Ordering | None = None
) -> None:
    """Shows that a level-causal backbone keeps to an ordering; for tests of one's own.

    Args:
        backbone: The backbone.
        length: D.
        ordering: The ordering; natural by default.

    Raises:
        CertificateError: If it leaks, mixes examples, or is not deterministic; with the first place
            that shows it.

    Example:
        >>> from dflows.backbones import LSTM
        >>> check_autoregressive(LSTM(width=8), length=6)
    """
    conditioner = Conditioner(
        num_classes=4,
        length=length,
        ordering=ordering or Natural(),
        backbone=backbone,
    )
    check_causal(conditioner)


def _named(transform: DiscreteTransform) -> str:
    if transform.ordering is not None:
        return f"a transform over {transform.ordering!r}"
    if isinstance(transform, Inverse):
        return f"the inverse of {_named(transform.transform)}"
    if isinstance(transform, Composition):
        return f"the stack of {len(transform.transforms)} transforms"
    return f"a transform {type(transform).__name__}"


def _shape_of(
    transform: DiscreteTransform, num_classes: int | None, length: int | None
) -> tuple[int, int]:
    for part in transform.modules():
        if isinstance(part, ConditionalTransform):
            num_classes = num_classes or part.bijection.num_classes
            length = length or part.length
    if num_classes is None or length is None:
        raise UserError(f"{_named(transform)} does not tell its shape: give num_classes and length")
    return num_classes, length


def _work(transform: DiscreteTransform, length: int) -> int:
    """Returns the values of one example that base → data, or an inverse back, goes over."""
    parts = [part for part in transform.modules() if isinstance(part, ConditionalTransform)]
    steps = [min(part.passes, length) for part in parts]
    return sum(
        count * (STEP if part.conditioner.steps else length)
        for count, part in zip(steps, parts, strict=True)
    )


def check_bijective(
    transform: DiscreteTransform,
    context: Tensor | None = None,
    num_values: int = 512,
    *,
    num_classes: int | None = None,
    length: int | None = None,
) -> None:
    """Shows ``inv(transform(x)) == x`` and ``transform(inv(y)) == y`` on random values.

    They have the transform's own shape where base → data takes 64 passes at most. Where it takes
    more, both are shown on events of 64 dimensions, and the first one on four events of all
    dimensions too, unless that were a matter of minutes: of a network without cached steps it is up
    to some 180 dimensions in a natural order, of one with them up to some 4,000. It is a test and
    no proof: a map that fails on rare values may pass.

    Two logits within round-off of each other may be told apart differently by evaluations of
    different shapes. One event in a hundred, or one of fewer, is allowed for that; what is no
    bijection misses more.

    Args:
        transform: The transform.
        context: One encoded context, (1, C) or (1, S, C).
        num_values: Values that are tried at least, over all dimensions.
        num_classes: K, of a transform that holds no conditional one, which would tell.
        length: D, likewise.

    Raises:
        CertificateError: If values do not come back, or are not values.
        UserError: If the shape is not known.
    """
    num_classes, length = _shape_of(transform, num_classes, length)
    passes = max(transform.passes, transform.inv.passes)
    with _quiet(transform):
        probed = _shaken(transform)
        shown = min(length, MOST_PASSES) if passes > MOST_PASSES else length
        tries = 8 if passes <= MOST_LEVELS else 1  # few levels choose few maps each time
        number = max(EVENTS, num_values // (tries * shown))
        for _ in range(tries):
            _stirred(probed)
            try:
                _check_round_trip(probed, context, num_classes, (number, shown))
                _check_round_trip(probed.inv, context, num_classes, (number, shown), inverted=True)
            except LengthError:
                if shown == length:
                    raise
        if shown < length and EVENTS * _work(transform, length) <= MOST_WORK:
            _check_round_trip(probed, context, num_classes, (EVENTS, length))


def _check_round_trip(
    transform: DiscreteTransform,
    context: Tensor | None,
    num_classes: int,
    shape: tuple[int, int],
    inverted: bool = False,
) -> None:
    device = _device(transform) if context is None else context.device
    contexts = _for_rows(context, shape[0])
    name = _named(transform.inv if inverted else transform)
    value = torch.randint(num_classes, shape, device=device)
    back = value
    for way in (transform, transform.inv):
        back = way(back, contexts)
        if back.shape != value.shape or back.is_floating_point():
            raise CertificateError(
                f"{name} makes {tuple(back.shape)} of dtype {back.dtype} of indices "
                f"{tuple(value.shape)}: a transform must return the kind that it was given"
            )
        if ((back < 0) | (back >= num_classes)).any():
            raise CertificateError(f"{name} makes values outside 0..{num_classes - 1}")
    missed = back != value
    if missed.any(dim=-1).sum() > max(NEAR_TIES * shape[0], 1):
        example, dimension = missed.nonzero()[0].tolist()
        told = "transform(inv(y)) is not y" if inverted else "inv(transform(x)) is not x"
        raise CertificateError(
            f"{name} is no bijection: {told} for {int(missed.sum())} of {missed.numel()} values, "
            f"first at dimension {dimension} of example {example}"
        )


def check_normalized(
    flow: DiscreteFlow,
    context: Tensor | None = None,
    *,
    max_states: int = 1_000_000,
    max_seconds: float = 5.0,
    tolerance: float = 1e-5,
) -> float | None:
    """Shows that the probabilities of all states sum to 1.

    Args:
        flow: The flow.
        context: One encoded context, (1, C) or (1, S, C).
        max_states: The most states K^D to enumerate.
        max_seconds: Time after which the enumeration is given up.
        tolerance: How far from 1 the sum may be.

    Returns:
        The sum, or nothing where there are too many states or too little time.

    Raises:
        CertificateError: If the sum is not 1.
    """
    states = flow.num_classes**flow.length
    if states > max_states:
        return None
    device = _device(flow)
    with _quiet(flow):
        probed = _shaken(flow)
        powers = flow.num_classes ** torch.arange(flow.length, device=device)
        begin, total = time.monotonic(), 0.0
        for block in torch.arange(states, device=device).split(4096):
            y = block.unsqueeze(-1) // powers % flow.num_classes
            total += probed._log_prob(y, _for_rows(context, len(y))).double().exp().sum().item()
            if time.monotonic() - begin > max_seconds and block[-1] < states - 1:
                return None
    if abs(total - 1) > tolerance:
        raise CertificateError(
            f"the probabilities of all {states} states sum to {total:.6f} and not to 1: a base's "
            "or transform's log_prob is wrong"
        )
    return total


def check_above_entropy(nll: float, entropy: float, standard_error: float = 0.0) -> None:
    """Shows that a negative log-likelihood is not below the entropy of the data.

    Args:
        nll: Mean negative log-likelihood, in nats.
        entropy: Entropy of the data's distribution, in nats.
        standard_error: Of the mean; four of them are allowed.

    Raises:
        CertificateError: If it is below, which no distribution can be.

    Example:
        >>> check_above_entropy(nll=7.7, entropy=7.6)
    """
    if nll < entropy - 4 * standard_error - 1e-6 * max(abs(entropy), 1):
        raise CertificateError(
            f"the negative log-likelihood of {nll:.6f} nats is below the entropy of the data, "
            f"{entropy:.6f}: it is no likelihood"
        )


def check_shorter(flow: DiscreteFlow, context: Tensor | None = None) -> None:
    """Shows that events of fewer dimensions can be scored, as the last window of a text is.

    One dimension less than the flow's, two, and one are tried. A part that takes no other length,
    as a table does, refuses it by a :class:`~dflows.errors.LengthError` when it meets one, and is
    left to.

    Args:
        flow: The flow.
        context: One encoded context, (1, C) or (1, S, C).

    Raises:
        CertificateError: If one fails.
    """
    device = _device(flow)
    lengths = {length for length in (flow.length - 1, 2, 1) if 0 < length < flow.length}
    with _quiet(flow):
        for length in sorted(lengths, reverse=True):
            try:
                flow._log_prob(torch.zeros(1, length, dtype=torch.long, device=device), context)
            except LengthError:
                continue
            except Exception as error:
                raise CertificateError(
                    f"an event of {length} dimensions fails where the flow has {flow.length}: "
                    f"{error}; a backbone must take any length up to the flow's, since the last "
                    "window of a text is shorter"
                ) from error


def _conditioners(parts: Sequence[nn.Module]) -> dict[Conditioner, int]:
    """Finds networks over orderings, with the lowest level whose output is of use."""
    found: dict[Conditioner, int] = {}
    for owner in nn.ModuleList(parts).modules():
        first = int(isinstance(owner, DiscreteTransform) and owner.ordering is not None)
        for part in owner.children():
            if isinstance(part, Conditioner):
                found[part] = min(first, found.get(part, first))
    return found


def check_flow(flow: DiscreteFlow, context: Tensor | None = None) -> None:
    """Runs all certificates on a flow.

    They are the causality of every network of the base and the transforms, from every dimension to
    every other; the bijectivity of every transform, of inverses and of those of one's own, and of
    the stack, on some random values (:func:`check_bijective` says which); shorter events; and
    normalization where it can be enumerated.

    Args:
        flow: The flow.
        context: A batch of contexts as the flow is called with, of which one is used; needed by a
            conditional flow.

    Raises:
        CertificateError: If one fails.
        UserError: If the parts of the flow do not fit each other.
    """
    with _quiet(flow):
        encoded = flow.encode_context(None if context is None else context[:1])
    # An encoder of contexts may hold networks over orderings of its own.
    for part, first_level in _conditioners([flow.base, *flow.transforms]).items():
        check_causal(part, encoded if part.takes_context else None, first_level=first_level)
    stack = [Composition(flow.transforms)] if len(flow.transforms) > 1 else []
    for transform in [*dict.fromkeys(flow.transforms), *stack]:
        check_bijective(transform, encoded, num_classes=flow.num_classes, length=flow.length)
    check_shorter(flow, encoded)
    check_normalized(flow, encoded)
