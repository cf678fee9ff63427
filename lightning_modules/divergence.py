"""Training that diverged is stopped before anything of it is kept."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dflows.errors import NonFiniteError
from lightning_modules.sharding import full

__all__ = ["FiniteWatch", "all_finite", "located"]

NEVER = 2**62
REMEDY = "lower model.optimization.learning_rate, or set trainer.gradient_clip_val"


@contextmanager
def located(part: str, step: int) -> Iterator[None]:
    """Adds the part of a run and its step to the message of a :class:`NonFiniteError`."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{error} (in {part}, at step {step})") from error


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Returns whether tensors are finite everywhere, a scalar on their device."""
    return full(torch.nn.utils.get_total_norm(list(tensors))).isfinite()


class FiniteWatch:
    """Creates what stops a training whose loss or gradients are not finite.

    On a CPU it raises at once. Elsewhere the first such step is noted on the device, so that no
    step has to wait for it, and :meth:`check` raises.
    """

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    def note(self, part: str, finite: Tensor, step: int) -> None:
        """Notes whether a part of a step, as `the loss`, is finite.

        Raises:
            NonFiniteError: If it is not, and lies on a CPU.
        """
        if finite.device.type == "cpu":
            if not finite:
                raise self._error(part, step)
            return
        first = torch.where(finite, NEVER, step)
        known = self._first.get(part)
        self._first[part] = first if known is None else torch.minimum(first, known)

    def check(self) -> None:
        """Asks for what was noted.

        Raises:
            NonFiniteError: If something was not finite; the message names the first step.
        """
        steps = {part: int(first) for part, first in self._first.items()}
        if steps and min(steps.values()) < NEVER:
            part = min(steps, key=lambda part: steps[part])
            raise self._error(part, steps[part])

    @staticmethod
    def _error(part: str, step: int) -> NonFiniteError:
        return NonFiniteError(
            f"the training diverged: {part} at step {step} is not finite: {REMEDY}"
        )
