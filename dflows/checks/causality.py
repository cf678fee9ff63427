"""Causality: what a network gives at a dimension depends on lower levels and nothing else."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from dflows.backbones import Backbone
from dflows.checks.probing import (
    CertificateError,
    context_rows,
    probed,
    values_of,
    variants,
)
from dflows.conditioner import Conditioner
from dflows.decoding import decide_levels
from dflows.errors import LengthError, UserError
from dflows.modules import device_of
from dflows.orderings import Natural, Ordering

__all__ = ["check_autoregressive", "check_causal"]

Evaluate: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
"""From values (N, d) and their contexts to what must depend on lower levels only, (N, d, F)."""

MOST_VALUES = 8192
"""Values of a batch that all levels share."""
MOST_PROBES = 1 << 16
"""Values that are evaluated at most in every round but the first."""
MOST_LEVELS = 4
"""Levels of a masked network that are evaluated."""
FEW = 8
"""Examples that shaken weights see together, at most."""
MOST_TOGETHER = 4096
"""Values that they see together, at most, but for those of two examples."""
STEPPED_ROWS = 2
"""Examples on which one evaluation is held against steps."""
TOLERANCE = 1e-6
DIVERGED = "training has most likely diverged, so lower the learning rate, or clip gradients"


@dataclass(frozen=True)
class _Round:
    """What a round of probes is: the network, the values, and how it is evaluated.

    Attributes:
        conditioner: The network with its ordering.
        length: d, dimensions of an event.
        first_level: The lowest level whose output is of use.
        context: Encoded contexts, which examples take in turn.
        batch: Rows of data, which they take in turn; random ones where there are none.
        batch_size: Examples of a batch.
        most: Values that are evaluated at most to look for leaks.
    """

    conditioner: Conditioner
    length: int
    first_level: int
    context: Tensor | None
    batch: Tensor | None
    batch_size: int
    most: int | None = None

    @property
    def name(self) -> str:
        return (
            f"backbone {self.conditioner.backbone.display_name} over {self.conditioner.ordering!r}"
        )

    def rows(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Returns values (number, d), and their contexts."""
        shape = number, self.length
        y = values_of(self.batch, self.conditioner.classes, shape)
        return y.to(device_of(self.conditioner)), context_rows(self.context, number)

    def evaluate(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Evaluates all levels, of a masked network a few, and says which backbone failed."""
        conditioner = self.conditioner
        members = conditioner.layout(y.shape[1], y.device).members
        try:
            if conditioner.one_pass:
                return conditioner.features(y, None, context)
            levels = torch.arange(self.first_level, len(members))
            spread = levels[torch.linspace(0, max(len(levels) - 1, 0), MOST_LEVELS).long().unique()]
            hidden = [torch.full((1,), level, device=y.device) for level in spread.tolist()]
            features = [conditioner.features(y, level, context) for level in hidden]
            return torch.cat(features, dim=1) if features else y.new_zeros(len(y), 0, 1).float()
        except UserError:
            raise
        except Exception as error:
            raise CertificateError(
                f"{self.name} failed on features "
                f"({y.shape[0]}, {y.shape[1]}, {conditioner.width}): {error}"
            ) from error

    def expert_terms(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Evaluates what the expert adds to the logits."""
        conditioner = self.conditioner
        if conditioner.expert is None:
            raise RuntimeError("there is no expert")
        levels = conditioner.layout(y.shape[1], y.device).levels
        terms: Tensor = conditioner.expert(y, levels, num_terms=conditioner.gate.out_features)
        return terms.flatten(2)


def check_causal(
    conditioner: Conditioner,
    context: Tensor | None = None,
    *,
    first_level: int = 0,
    batch: Tensor | None = None,
    trained: bool = False,
    batch_size: int = FEW,
    shorter: bool = True,
) -> None:
    """Shows that a network's output at a dimension depends on lower levels and nothing else.

    A level-causal network is checked at every level: by its steps, which receive only lower levels,
    or else by changing all values of this and of higher levels, one level at a time. It is checked
    with and without ``torch.inference_mode``, on random values and on data, and on shorter events.

    Args:
        conditioner: The network with its ordering.
        context: Encoded contexts, (B, C) or (B, S, C), which examples take in turn.
        first_level: The lowest level whose output is of use: 1 in a transform.
        batch: Data, indices (B, d), on whose rows it is shown as well as on random ones.
        trained: Whether to show it of the weights as they are too, not of shaken ones alone.
        batch_size: Examples that evaluation scores together; the weights as they are see as many.
        shorter: Whether to show it on shorter events too.

    Raises:
        CertificateError: If it depends on a value of its own or a higher level, on another example
            of the batch, or on chance, or is not finite; with the first place that shows it.
    """
    length = conditioner.length
    with probed(conditioner) as copied:
        for probe, shaken in variants(copied, trained):
            random = _Round(probe, length, first_level, context, None, 2)
            _check(random, shaken)
            random = replace(random, most=MOST_PROBES)
            with torch.inference_mode():
                few = max(min(batch_size, FEW, MOST_TOGETHER // length), 2)
                data = replace(random, batch=batch, batch_size=few)
                _check(data if shaken else replace(data, batch_size=max(batch_size, 2)), shaken)
                if shorter and length > 2:
                    _check_shorter(replace(random, length=length - 1), shaken)
                    _check_shorter(replace(data, length=length // 2 + 1), shaken)


def _check_shorter(probes: _Round, shaken: bool) -> None:
    try:
        _check(probes, shaken)
    except LengthError:
        pass
    except UserError as error:
        if isinstance(error, CertificateError) and error.__cause__ is None:
            raise CertificateError(f"on an event of {probes.length} dimensions, {error}") from error
        raise CertificateError(
            f"an event of {probes.length} dimensions fails where the flow has "
            f"{probes.conditioner.length}: {error}; a backbone must take any length up to the "
            "flow's, since the last window of a text is shorter"
        ) from error


def _check(probes: _Round, shaken: bool) -> None:
    _check_examples(probes, shaken)
    conditioner = probes.conditioner
    if conditioner.expert is not None:
        name = f"expert {type(conditioner.expert).__name__} over {conditioner.ordering!r}"
        _check_levels(probes, name, probes.expert_terms)
    if not conditioner.one_pass:
        return  # what is masked cannot leak
    if conditioner.steps:
        _check_steps(probes)
        # Steps know nothing of batches that are as large as those to come.
        probes = replace(probes, most=probes.batch_size * probes.length)
    if conditioner.stateful:
        _check_resumed(probes)
    _check_levels(probes, probes.name, probes.evaluate)


def _check_examples(probes: _Round, shaken: bool) -> None:
    """Shows that features are finite, deterministic, and each example's own."""
    y, contexts = probes.rows(probes.batch_size)
    before = probes.evaluate(y, contexts)
    if not before.isfinite().all():
        dimension = int((~before.isfinite()).nonzero()[0, 1]) % probes.length
        remedy = "its outputs must be numbers" if shaken else DIVERGED
        raise CertificateError(
            f"{probes.name} returns features that are not finite, first at dimension {dimension}: "
            f"{remedy}"
        )
    if _first_change(before, probes.evaluate(y, contexts)) is not None:
        raise CertificateError(
            f"{probes.name} gives another result when it is evaluated again: it must be "
            "deterministic in evaluation mode"
        )
    for kept in (0, len(y) - 1):
        other = probes.conditioner.classes.shift(y, 1)
        other[kept] = y[kept]
        where = _first_change(before[[kept]], probes.evaluate(other, contexts)[[kept]])
        if where is not None:
            raise CertificateError(
                f"{probes.name} mixes the examples of a batch, seen at dimension "
                f"{where[1] % probes.length}: the features are (batch, length, width); a torch "
                "Transformer needs batch_first: true, and batch normalization must use its running "
                "statistics in evaluation (track_running_stats: true), not those of the batch"
            )


def _first_change(
    before: Tensor, after: Tensor, looked_at: Tensor | None = None
) -> tuple[int, ...] | None:
    """Finds where features (N, d, F) differ by more than round-off of their column."""
    finite = before.where(before.isfinite(), 0).abs()
    scale = finite.flatten(0, -2).amax(dim=0) if finite.numel() else finite
    same = (before == after) | ((before - after).abs() <= TOLERANCE * scale)
    changed = (~same if looked_at is None else ~same & looked_at).nonzero()
    return tuple(changed[0].tolist()) if len(changed) else None


def _check_steps(probes: _Round) -> None:
    """Compares one evaluation with steps, which never see what they must not."""
    # Steps add up in another order: float64 tells the round-off of that from a leak.
    with torch.inference_mode(False):
        exact = copy.deepcopy(probes.conditioner).double()
    y, contexts = probes.rows(STEPPED_ROWS)
    steps = torch.zeros(*y.shape, exact.num_logits, dtype=torch.double, device=y.device)

    def note(dimensions: Tensor, logits: Tensor) -> Tensor:
        steps[:, dimensions] = logits.double()
        return y[:, dimensions]

    first = probes.first_level
    logits = exact(y, contexts, first_level=first).double()
    unsound = ~logits.amax(dim=-1).isfinite()
    if unsound.any():
        raise CertificateError(
            f"the head or the expert of {probes.name} gives logits that are not finite, first at "
            f"dimension {int(unsound.nonzero()[0, 1])}: {DIVERGED}"
        )
    decide_levels(exact, y, note, contexts, first_level=first)
    where = _first_change(steps, logits)
    if where is not None:
        _check_levels(replace(probes, most=None), probes.name, probes.evaluate)
        raise CertificateError(
            f"{probes.name} computes other logits by steps than in one evaluation, first at "
            f"dimension {where[1]}: `begin` and `advance` must give what `forward` does"
        )


def _check_resumed(probes: _Round) -> None:
    """Shows that `resume` agrees with `forward` where texts start, and elsewhere is causal."""
    with torch.inference_mode(False):
        exact = copy.deepcopy(probes.conditioner).double()
    y, _ = probes.rows(STEPPED_ROWS)
    where = _first_change(exact(y), exact.resume(y, y.new_full((len(y),), -1))[0])
    if where is not None:
        raise CertificateError(
            f"{probes.name} computes other logits from an empty state than in one evaluation, "
            f"first at dimension {where[1]}: `resume` must give what `forward` does"
        )

    def going_on(y: Tensor, _: Tensor | None) -> Tensor:
        classes = torch.arange(y.shape[1], device=y.device) % probes.conditioner.num_classes
        before = classes.expand_as(y)
        _, state = probes.conditioner.resume(before, y.new_full((len(y),), -1))
        return probes.conditioner.resume(y, before[:, -1], state)[0]

    _check_levels(probes, f"{probes.name}, in windows that go on,", going_on)


def _check_levels(probes: _Round, name: str, evaluate: Evaluate) -> None:
    """Changes all values from one level on, a row for every level, and looks at those below."""
    conditioner, length, first = probes.conditioner, probes.length, probes.first_level
    layout = conditioner.layout(length, device_of(conditioner))
    levels, device = layout.levels, layout.levels.device
    tried = torch.arange(first, len(layout.members), device=device)
    if not len(tried):
        return
    if probes.most is None:
        rows = min(len(tried), max(MOST_VALUES // length, 2))
    else:
        rows = probes.batch_size
        tried = tried[torch.randperm(len(tried), device=device)]
        tried = tried[: max(probes.most // length, 1)]
    needed = levels >= first
    for chunk in tried.split(rows):
        y, contexts = probes.rows(rows)
        # Rows of equal number and place are rounded alike.
        begin = chunk[torch.arange(rows, device=device) % len(chunk)].unsqueeze(-1)
        changed = torch.where(levels >= begin, conditioner.classes.other(y), y)
        before, after = evaluate(y, contexts), evaluate(changed, contexts)
        forbidden = ((levels <= begin) & needed).unsqueeze(-1)
        where = _first_change(before, after, forbidden)
        if where is not None:
            row, target = where[:2]
            source = _source(lambda y: evaluate(y, contexts), y, changed[row], row, target)  # noqa: B023
            raise CertificateError(
                f"{name} leaks: the value at dimension {source} (level "
                f"{int(levels[source])}) changes the output at dimension {target} (level "
                f"{int(levels[target])}), which may depend on lower levels only"
            )


def _source(
    evaluate: Callable[[Tensor], Tensor], y: Tensor, changed: Tensor, row: int, target: int
) -> int:
    """Finds, by bisection, one of a row's changed values that changes its output at a dimension."""
    suspects = (y[row] != changed).nonzero().squeeze(-1)
    before = evaluate(y)
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        tried = y.clone()
        tried[row, half] = changed[half]
        after = evaluate(tried)
        if _first_change(before[[row]][:, [target]], after[[row]][:, [target]]) is not None:
            suspects = half
        else:  # the change comes on top of these
            y, before, suspects = tried, after, suspects[len(half) :]
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
        UserError: If the backbone is not level-causal.

    Example:
        >>> from dflows.backbones import LSTM
        >>> check_autoregressive(LSTM(width=8), length=6)
    """
    if not backbone.level_causal:
        raise UserError(
            f"{type(backbone).__name__} is not level-causal and runs masked, whatever the "
            "ordering: there is nothing to check"
        )
    check_causal(
        Conditioner(num_classes=4, length=length, ordering=ordering or Natural(), backbone=backbone)
    )
