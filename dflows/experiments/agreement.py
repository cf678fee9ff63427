"""Whether a record is of the run that a plan describes now."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["disagreements"]


def disagreements(
    recorded: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Compares a recorded configuration with keys that were laid over each other.

    A recorded one is complete. Where a class took the place of another, arguments that it does not
    have are no difference, as they make none in a run.

    Args:
        recorded: The resolved configuration of a record, in plain types.
        wanted: The keys that a run would set.
        prefix: What the keys are inside.

    Yields:
        Every key that differs, dotted.

    Example:
        >>> recorded = {"trainer": {"max_steps": 500}, "seed_everything": 0}
        >>> list(disagreements(recorded, {"trainer": {"max_steps": 600}}))
        ['trainer.max_steps']
    """
    for key, value in wanted.items():
        if key not in recorded:
            # Of a class: its arguments are those that its signature has.
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
        yield from disagreements(recorded, wanted, f"{name}.")
    elif _listed(recorded) and _listed(wanted) and len(recorded) == len(wanted):
        for number, pair in enumerate(zip(recorded, wanted, strict=True)):
            yield from _compared(*pair, f"{name}.{number}")
    elif recorded != wanted:
        yield name


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _last(path: str) -> str:
    return path.rpartition(".")[2]
