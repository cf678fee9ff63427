"""Checkpoints that say what they are: written whole, read without running what is in them."""

import argparse
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from pytorch_lightning.plugins.io import TorchCheckpointIO

from datamodules.vocabulary import Vocabulary, parse_vocabulary
from dflows.errors import UserError
from dflows.files import atomic_write, make_folder
from lightning_modules import BaseModule
from lightning_modules.archives import seal
from lightning_modules.checkpoints import KEY, load_weights, match_precision, read_content
from lightning_modules.descriptions import check_plain, instantiate

__all__ = [
    "Checkpoint",
    "WholeCheckpoints",
    "add_checkpoint_arguments",
    "checkpoint_argument",
    "describe_run",
    "load_model",
    "read_checkpoint",
]


class _File(io.FileIO):
    """Creates a file that remembers why it could not be written: torch does not tell."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes."""
        try:
            return super().write(data) or 0
        except OSError as error:
            self.error = error
            raise


class WholeCheckpoints(TorchCheckpointIO):
    """Creates the writer of checkpoints that are there whole or not at all, even after a crash."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes a temporary file and moves it into place.

        Raises:
            UserError: If it cannot be written.
        """
        path = Path(path)
        make_folder(path.parent)
        # One name: what a killed run leaves is written over, and large files do not pile up.
        with atomic_write(path, f".{path.name}.tmp") as unfinished:
            raw = _File(unfinished, "wb")
            try:
                with io.BufferedWriter(raw) as file:
                    torch.save(checkpoint, file)
            except RuntimeError as error:
                raise raw.error or error from None
            seal(unfinished)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: Any = None
    ) -> dict[str, Any]:
        """Reads a checkpoint without running anything that is in it, whatever is asked for."""
        return read_content(path, map_location or "cpu")


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

    Args:
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
    content = read_content(path)
    described = content.get(KEY)
    if not isinstance(described, dict):
        raise UserError(
            f"{path} is a checkpoint of something else: give one that `python -m dflows.fit` wrote"
        )
    if described.get("format") != 1:
        raise UserError(
            f"{path} has the format {str(described.get('format'))[:20]}, and this dflows reads 1: "
            "use the dflows that wrote it"
        )
    config, text, length = (described.get(key) for key in ("config", "vocabulary", "length"))
    if not (
        isinstance(config, dict) and isinstance(text, str) and type(length) is int and length > 0
    ):
        raise UserError(
            f"the description in {path} is damaged: give a checkpoint that `python -m dflows.fit` "
            "wrote"
        )
    check_plain(config, path)
    vocabulary = parse_vocabulary(text, f"the vocabulary in {path}")
    return Checkpoint(path, content["state_dict"], config, vocabulary, length)


def load_model(checkpoint: Checkpoint, allowed: Sequence[str] = ()) -> BaseModule:
    """Makes the model of a checkpoint.

    Args:
        checkpoint: What :func:`read_checkpoint` returned.
        allowed: Packages, other than dflows' own, whose classes may be imported.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        UserError: If it names classes of other packages, or its vocabulary or weights do not fit.
    """
    base: type[BaseModule] = BaseModule  # type: ignore[type-abstract]
    model = instantiate(base, checkpoint.config.get("model"), allowed, checkpoint.path)
    num_classes = getattr(getattr(model, "flow", None), "num_classes", None)
    if num_classes not in (None, checkpoint.vocabulary.num_classes):
        raise UserError(
            f"the model in {checkpoint.path} has {num_classes} classes, and its vocabulary has "
            f"{checkpoint.vocabulary.num_classes}: give a checkpoint that `python -m dflows.fit` "
            "wrote"
        )
    match_precision(model, checkpoint.weights)
    load_weights(model, checkpoint.weights, checkpoint.path)
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
        help="Packages, other than dflows' own, whose classes a checkpoint may name.",
    )


def checkpoint_argument(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the checkpoint and the allowed packages that arguments name, before all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--checkpoint")
    parser.add_argument("--allow", nargs="*", default=[])
    found, rest = parser.parse_known_args(list(arguments))
    path = None if {"-h", "--help"} & set(rest) else found.checkpoint
    return path, found.allow
