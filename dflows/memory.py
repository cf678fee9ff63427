"""How much memory there is, and a refusal of what cannot fit before it is begun."""

import os
from pathlib import Path

from dflows.errors import UserError

__all__ = ["check_memory", "total_memory"]

LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where a container says how much its processes may take."""


def total_memory() -> int:
    """Returns the bytes of memory that this machine, or its container, has."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in LIMITS:
        try:
            found.append(int(file.read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such limit
            continue
    return min(found)


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Refuses what takes more memory than there is.

    Args:
        needed: The bytes that it takes at least.
        what: What takes them.
        remedy: What to change.

    Raises:
        UserError: If they are more than :func:`total_memory`.

    Example:
        >>> check_memory(10**15, "a table of bigrams", "give a smaller vocabulary")
        Traceback (most recent call last):
        ...
        dflows.errors.UserError: a table of bigrams takes at least 1,000,000 GB of memory, and ...
    """
    total = total_memory()
    if needed > total:
        raise UserError(
            f"{what} takes at least {needed / 1e9:,.0f} GB of memory, and there are "
            f"{total / 1e9:,.0f}: {remedy}"
        )
