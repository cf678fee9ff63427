"""Configurations that are laid over each other, as plain keys."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dflows.cli.configs import resolved_arguments

__all__ = ["laid_over"]


def laid_over(configs: Sequence[str], overlays: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Lays keys over configurations, as `python -m dflows.fit` does with several.

    Args:
        configs: Configurations, files or the names of shipped ones, the first beneath all others.
        overlays: Keys laid over them, one mapping over the other.

    Returns:
        All keys, nested.

    Raises:
        UserError: If a configuration is neither a file nor shipped.

    Example:
        >>> keys = laid_over(["quickstart.yaml"], [{"trainer": {"max_steps": 10}}])
        >>> keys["trainer"]["max_steps"], keys["trainer"]["accelerator"]
        (10, 'cpu')
    """
    pairs = [part for name in configs for part in ("--config", name)]
    result: dict[str, Any] = {}
    with resolved_arguments(pairs) as resolved:
        for path in resolved[1::2]:
            _lay(yaml.safe_load(Path(path).read_text(encoding="utf-8")), result)
    for overlay in overlays:
        _lay(overlay, result)
    return result


def _lay(keys: Mapping[str, Any], under: dict[str, Any]) -> None:
    for key, value in keys.items():
        if isinstance(value, Mapping):
            below = under.get(key)
            under[key] = dict(below) if isinstance(below, dict) else {}
            _lay(value, under[key])
        else:
            under[key] = value
