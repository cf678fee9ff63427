"""How much memory there is, and refusals of what cannot fit before it is begun."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.overrides import TorchFunctionMode

from dflows.errors import UserError

__all__ = ["bounded", "check_memory", "most_held", "total_memory"]

LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where a container says how much its processes may take."""

MOST_TENSORS = 20_000
"""Tensors that a model may be made of."""

_MAKERS = frozenset(
    {
        *(torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.empty_strided),
        *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.arange, torch.linspace),
    }
)


def total_memory(device: torch.device | None = None) -> int:
    """Returns the bytes of memory that there are.

    Args:
        device: The device that has them; without a CUDA device, the machine or its container.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in LIMITS:
        try:
            found.append(int(file.read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such limit
            continue
    return min(found)


def check_memory(needed: int, what: str, remedy: str, device: torch.device | None = None) -> None:
    """Refuses what takes more memory than there is.

    Args:
        needed: The bytes that it takes at least.
        what: What takes them.
        remedy: What to change.
        device: The device that they are on, as :func:`total_memory` takes it.

    Raises:
        UserError: If they are more than :func:`total_memory`.

    Example:
        >>> check_memory(10**15, "a table of bigrams", "give a smaller vocabulary")
        Traceback (most recent call last):
        ...
        dflows.errors.UserError: a table of bigrams takes at least 1,000,000 GB of memory, and ...
    """
    total = total_memory(device)
    if needed > total:
        raise UserError(
            f"{what} takes at least {needed / 1e9:,.0f} GB of memory, and there are "
            f"{total / 1e9:,.0f}: {remedy}"
        )


class bounded(TorchFunctionMode):  # noqa: N801 - a context, like torch.no_grad
    """Creates a context that refuses tensors before they are made, once there is no room for all.

    Args:
        what: What is made of the tensors.
        remedy: What to change.

    Entering it, tensors that are made raise a UserError if they take more than
    :func:`total_memory`, or are more than :data:`MOST_TENSORS`.

    Example:
        >>> with bounded("the model", "give a smaller width"):
        ...     torch.zeros(10**9, 10**9)
        Traceback (most recent call last):
        ...
        dflows.errors.UserError: the model takes at least 4,000,000,000 GB of memory, and ...
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__()
        self._what = what
        self._remedy = remedy
        self._bytes = self._number = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MAKERS:
            options = {name: value for name, value in kwargs.items() if name != "generator"}
            try:
                sized = func(*args, **{**options, "device": "meta"})
            except RuntimeError as error:
                if "overflow" in str(error):
                    raise UserError(f"{self._what} is beyond all memory: {self._remedy}") from None
                raise
            self._bytes += sized.numel() * sized.element_size()
            self._number += 1
            check_memory(self._bytes, self._what, self._remedy)
            if self._number > MOST_TENSORS:
                raise UserError(
                    f"{self._what} has more than {MOST_TENSORS:,} tensors: {self._remedy}"
                )
        return func(*args, **kwargs)


def most_held(profiled: profile, since: str | None = None) -> int:
    """Returns the bytes that tensors held at most on a CPU, of those made while it was profiled.

    Args:
        profiled: What `torch.autograd.profiler.profile(profile_memory=True)` saw.
        since: The `torch.profiler.record_function` from which on they count at most; all is held
            that was made before and is still there.

    Example:
        >>> with profile(profile_memory=True) as profiled:
        ...     for _ in range(3):
        ...         _ = torch.zeros(1000)
        >>> 4000 <= most_held(profiled) < 12000
        True
    """
    held = most = 0
    counts = since is None
    events = profiled.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        counts |= event.name() == since
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held) if counts else 0
    return most
