"""Configurations as plain keys: merged, and compared with those of records."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dflows.cli.configs import resolved_arguments

__all__ = ["config_diff", "merge_configs"]


def merge_configs(configs: Sequence[str], overlays: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges configurations and keys, as `python -m dflows.fit` does with several.

    Args:
        configs: Configurations, files or the names of shipped ones; a later one wins.
        overlays: Keys that win over them; a later mapping wins.

    Returns:
        All keys, nested.

    Raises:
        UserError: If a configuration is neither a file nor shipped.

    Example:
        >>> keys = merge_configs(["quickstart.yaml"], [{"trainer": {"max_steps": 10}}])
        >>> keys["trainer"]["max_steps"], keys["trainer"]["accelerator"]
        (10, 'cpu')
    """
    pairs = [part for name in configs for part in ("--config", name)]
    result: dict[str, Any] = {}
    with resolved_arguments(pairs) as resolved:
        for path in resolved[1::2]:
            _merge(yaml.safe_load(Path(path).read_text(encoding="utf-8")), result)
    for overlay in overlays:
        _merge(overlay, result)
    return result


def _merge(keys: Mapping[str, Any], into: dict[str, Any]) -> None:
    for key, value in keys.items():
        if isinstance(value, Mapping):
            below = into.get(key)
            into[key] = dict(below) if isinstance(below, dict) else {}
            _merge(value, into[key])
        else:
            into[key] = value


def config_diff(
    recorded: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Compares the configuration of a record with the keys that a run would set.

    A recorded configuration is complete. Arguments that its class does not have are ignored, as a
    run ignores them where one class replaces another.

    Args:
        recorded: The resolved configuration of a record, in plain types.
        wanted: The keys that a run would set.
        prefix: The dotted path of the keys.

    Yields:
        Every key that differs, dotted.

    Example:
        >>> recorded = {"trainer": {"max_steps": 500}, "seed_everything": 0}
        >>> list(config_diff(recorded, {"trainer": {"max_steps": 600}}))
        ['trainer.max_steps']
    """
    for key, value in wanted.items():
        if key not in recorded:
            # A record has every argument of its class.
            if not prefix.endswith("init_args."):
                yield f"{prefix}{key}"
            continue
        yield from _compared(recorded[key], value, f"{prefix}{key}")


def _compared(recorded: Any, wanted: Any, name: str) -> Iterator[str]:
    if isinstance(recorded, Mapping) and "class_path" in recorded:
        if isinstance(wanted, str):
            wanted = {"class_path": wanted}
        if isinstance(wanted, Mapping):
            chosen = wanted.get("class_path", recorded["class_path"])
            if _last(chosen) != _last(recorded["class_path"]):
                yield name
                return
            wanted = {key: value for key, value in wanted.items() if key != "class_path"}
    if isinstance(recorded, Mapping) and isinstance(wanted, Mapping):
        yield from config_diff(recorded, wanted, f"{name}.")
    elif _listed(recorded) and _listed(wanted) and len(recorded) == len(wanted):
        for number, pair in enumerate(zip(recorded, wanted, strict=True)):
            yield from _compared(*pair, f"{name}.{number}")
    elif recorded != wanted:
        yield name


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _last(path: str) -> str:
    return path.rpartition(".")[2]
