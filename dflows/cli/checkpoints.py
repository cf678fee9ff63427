"""Checkpoints that say what they are: written whole, read without running what is in them."""

import argparse
import copy
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from pytorch_lightning.plugins.io import TorchCheckpointIO

from datamodules.vocabulary import Vocabulary, parse_vocabulary
from dflows.errors import UserError
from lightning_modules import BaseModule

__all__ = [
    "KEY",
    "Checkpoint",
    "WholeCheckpoints",
    "add_checkpoint_arguments",
    "check_trusted",
    "checkpoint_argument",
    "describe_run",
    "load_model",
    "load_weights",
    "read_checkpoint",
]

KEY = "dflows"
"""Where a checkpoint keeps the description of its model and data."""

TRUSTED = ("dflows", "datamodules", "lightning_modules", "torch.nn")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class WholeCheckpoints(TorchCheckpointIO):
    """Creates the writer of checkpoints that are there whole or not at all, even after a crash."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes beside the place and moves there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # One name: what a killed run leaves is written over, and large files do not pile up.
        unfinished = path.with_name(f".{path.name}.tmp")
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            raise UserError(f"cannot write the checkpoint {path}: {error.strerror}") from error
        finally:
            unfinished.unlink(missing_ok=True)


def describe_run(config: Mapping[str, Any], vocabulary: str, length: int) -> dict[str, Any]:
    """Returns what a checkpoint has to say of itself, in types that a safe reader takes.

    Args:
        config: The resolved configuration, what the model takes from the data included.
        vocabulary: The text of tokenizer.json.
        length: Dimensions of an event, D.
    """
    return {"format": 1, "config": dict(config), "vocabulary": vocabulary, "length": length}


@dataclass(frozen=True)
class Checkpoint:
    """Creates the contents of a checkpoint of dflows.

    Arguments:
        path: The file.
        weights: State of the module.
        config: Resolved configuration of the run.
        vocabulary: Classes and symbols.
        length: Dimensions of an event, D.
    """

    path: Path
    weights: Mapping[str, Any]
    config: Mapping[str, Any]
    vocabulary: Vocabulary
    length: int


def read_checkpoint(
    path: str | os.PathLike[str], names: Sequence[str] = ("best.ckpt", "last.ckpt")
) -> Checkpoint:
    """Reads a checkpoint without running anything that is in it.

    Args:
        path: The file, or the folder of a run.
        names: Of the folder, the first of these that is there is read.

    Returns:
        Its contents, on the CPU.

    Raises:
        UserError: If the file is missing, damaged, or not of dflows.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds no {' and no '.join(names)}: give a checkpoint")
        path = found[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: give the path of a file, like best.ckpt") from None
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # noqa: BLE001 - what is no checkpoint fails in any way
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} is damaged or no checkpoint of dflows ({reason[0][:120]}): give one that "
            "`python -m dflows.fit` wrote"
        ) from None
    described = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(described, dict) or "state_dict" not in content:
        raise UserError(
            f"{path} is a checkpoint of something else: give one that `python -m dflows.fit` wrote"
        )
    if described.get("format") != 1:
        raise UserError(
            f"{path} has the format {described.get('format')}, and this dflows reads 1: use the "
            "dflows that wrote it"
        )
    vocabulary = parse_vocabulary(described["vocabulary"], f"the vocabulary in {path}")
    length = int(described["length"])
    return Checkpoint(path, content["state_dict"], described["config"], vocabulary, length)


def _import_paths(value: Any, *, everywhere: bool, key: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _import_paths(entry, everywhere=everywhere, key=str(name))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _import_paths(entry, everywhere=everywhere, key=key)
    elif isinstance(value, str) and (
        key == "class_path" or (everywhere and _IMPORT_PATH.fullmatch(value))
    ):
        yield value


def check_trusted(checkpoint: Checkpoint, allowed: Sequence[str] = ()) -> None:
    """Refuses a checkpoint that names classes of packages which nobody vouched for.

    Loading it would import them, and so run their code.

    Args:
        checkpoint: The checkpoint.
        allowed: Packages that the user vouches for.

    Raises:
        UserError: If it names another.
    """
    trusted = (*TRUSTED, *allowed)
    config = checkpoint.config
    named = [
        *_import_paths(config.get("model"), everywhere=True),
        *_import_paths(config.get("data"), everywhere=False),
    ]
    for path in named:
        if not any(path == package or path.startswith(f"{package}.") for package in trusted):
            raise UserError(
                f"{checkpoint.path} names the class {path}, and loading it would run its package: "
                f"add --allow {path.split('.')[0]} if you trust that"
            )


def load_weights(checkpoint: Checkpoint, model: BaseModule) -> None:
    """Gives a model the weights of a checkpoint.

    Args:
        checkpoint: What :func:`read_checkpoint` returned.
        model: The model.

    Raises:
        UserError: If they do not fit; the message names the file and the first weights that do not.
    """
    try:
        model.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        _, *reasons = str(error).splitlines() or [""]
        shown = textwrap.shorten(reasons[0] if reasons else str(error), 200, placeholder=" …")
        raise UserError(
            f"the weights in {checkpoint.path} do not fit the model: {shown.rstrip('.')}: give it "
            "the configuration that it was trained with"
        ) from None


def load_model(checkpoint: Checkpoint, allowed: Sequence[str] = ()) -> BaseModule:
    """Makes the model of a checkpoint.

    Args:
        checkpoint: What :func:`read_checkpoint` returned.
        allowed: Packages, beside dflows' own, whose classes may be imported.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        UserError: If it names classes of other packages, or its weights do not fit.
    """
    check_trusted(checkpoint, allowed)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BaseModule, "model", required=True)
    # Parsing changes what it is given.
    parsed = parser.parse_object({"model": copy.deepcopy(checkpoint.config["model"])})
    model: BaseModule = parser.instantiate_classes(parsed).model
    load_weights(checkpoint, model)
    return model.eval()


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments of every command that begins with a checkpoint."""
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="A checkpoint, or the folder of a run."
    )
    parser.add_argument(
        "--allow",
        type=str,
        nargs="*",
        default=[],
        help="Packages, beside dflows' own, whose classes a checkpoint may name.",
    )


def checkpoint_argument(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the checkpoint and the allowed packages that arguments name, before all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--checkpoint")
    parser.add_argument("--allow", nargs="*", default=[])
    found, rest = parser.parse_known_args(list(arguments))
    path = None if {"-h", "--help"} & set(rest) else found.checkpoint
    return path, found.allow
