"""Processes of this checkout that commands start."""

import os
from pathlib import Path

__all__ = ["ROOT", "environment"]

ROOT = Path(__file__).parents[1]
"""The folder of the checkout."""


def environment(**more: str) -> dict[str, str]:
    """Returns the environment of a process that imports this checkout, from any folder.

    Args:
        more: Variables beside those that there are.

    Example:
        >>> environment(OMP_NUM_THREADS="1")["OMP_NUM_THREADS"]
        '1'
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}
