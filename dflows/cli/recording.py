"""The record of a finished run, in which no path of the machine is left."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dflows.cli.summary import trainer_device
from dflows.errors import UserError
from dflows.provenance import describe_device
from dflows.records import Record, write_record
from dflows.reporting import Report
from lightning_modules import BaseModule

__all__ = ["below_here", "make_record", "without_machine", "write_records"]

OF_THE_COMMAND = ("ckpt_path", "record")
"""Keys that say where a command read and wrote, and nothing of what it ran."""


def below_here(path: Path) -> Path:
    """Returns a path relative to the working folder if it lies in there, or else absolute."""
    path, here = path.resolve(), Path.cwd().resolve()
    return path.relative_to(here) if path.is_relative_to(here) else path


def without_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration without what only the machine of the run can have meant.

    Absolute paths begin at the working folder, and those that lie outside it keep their last part
    alone. Where checkpoints and records went is left away.

    Args:
        config: A resolved configuration in plain types.

    Example:
        >>> without_machine({"record": "results", "path": "/home/me/text8.gz", "separator": "/"})
        {'path': '.../text8.gz', 'separator': '/'}
    """
    kept = {key: value for key, value in config.items() if key not in OF_THE_COMMAND}
    portable: dict[str, Any] = _portable(kept)
    return portable


def _portable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _portable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_portable(entry) for entry in value]
    # A slash alone separates texts, and tells nothing of a machine.
    if not isinstance(value, str) or not Path(value).is_absolute() or not Path(value).name:
        return value
    path = below_here(Path(value))
    return f".../{path.name}" if path.is_absolute() else str(path)


def make_record(
    trainer: pl.Trainer,
    report: Report,
    *,
    name: str,
    kind: str,
    config: Mapping[str, Any],
    code: str,
    seconds: float,
    budget: str = "",
) -> Record:
    """Makes the record of what a trainer has run.

    Args:
        trainer: The trainer, whose module is the model.
        report: What came of it.
        name: Name of the run.
        kind: The command.
        config: The resolved configuration in plain types.
        code: The revision when the command began: a checkout may change while it runs.
        seconds: Seconds that the command took.
        budget: What the run was allowed.

    Raises:
        UserError: If the name cannot be that of a record.
    """
    module = trainer.lightning_module
    likelihood = module.likelihood if isinstance(module, BaseModule) else "exact"
    return Record(
        name=name,
        kind=kind,
        config=without_machine(config),
        seed=int(config.get("seed_everything") or 0),
        device=describe_device(trainer_device(trainer), trainer.world_size),
        precision=trainer.precision,
        seconds=seconds,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        metrics=report.metrics,
        likelihood=likelihood,
        budget=budget,
        revision=code,
    )


def write_records(folders: Iterable[Path | str | None], record: Record) -> list[Path]:
    """Writes a record into folders, as many as can be written into.

    Args:
        folders: The folders; what is no folder is left out.
        record: The record.

    Returns:
        The files.

    Raises:
        UserError: If one could not be written, when the others are.
    """
    written, failed = [], []
    for folder in folders:
        if folder is not None:
            try:
                written.append(write_record(folder, record))
            except UserError as error:
                failed.append(error)
    if failed:
        kept = f"; the record is in {written[0]}" if written else ""
        raise UserError(f"{failed[0]}{kept}") from failed[0]
    return written
