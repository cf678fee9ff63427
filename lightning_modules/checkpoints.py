"""Modules from checkpoints, made without running any code that is in the file."""

import inspect
import os
import textwrap
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pytorch_lightning as pl
import torch
from torch import nn

from dflows.errors import UserError
from lightning_modules.descriptions import instantiate

__all__ = [
    "KEY",
    "load_weights",
    "read_content",
    "rebuild",
    "seal",
]

KEY = "dflows"
"""Where a checkpoint of `python -m dflows.fit` keeps the description of its model and data."""

_SEAL = b"dflows crc32 "
_SEAL_LENGTH = len(_SEAL) + 8
_BLOCK = 1 << 20
_HYPERPARAMETERS = "hyper_parameters"

M = TypeVar("M", bound=pl.LightningModule)


def _checksum(file: BinaryIO, size: int) -> int:
    """Returns the CRC-32 of the first bytes of a file."""
    checksum = 0
    file.seek(0)
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        checksum, size = zlib.crc32(block, checksum), size - len(block)
    return checksum


def seal(path: str | os.PathLike[str]) -> None:
    """Ends the file of a checkpoint with a checksum of all before it, and writes it through.

    It is the comment that a zip archive may end with, so that the file stays what it was for all
    other readers.
    """
    with Path(path).open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        # An archive ends with the length of its comment, in two bytes.
        file.seek(size - 2)
        if file.read(2) != b"\0\0":
            return
        file.seek(size - 2)
        file.write(_SEAL_LENGTH.to_bytes(2, "little"))
        file.flush()
        file.write(_SEAL + b"%08x" % _checksum(file, size))
        file.flush()
        os.fsync(file.fileno())


def _check_seal(path: Path) -> None:
    """Refuses a file whose bytes are not those that were written."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _SEAL_LENGTH))
        seal = file.read()
        if seal.startswith(_SEAL):
            whole = seal == _SEAL + b"%08x" % _checksum(file, size - _SEAL_LENGTH)
        else:
            # Not of WholeCheckpoints: the archive itself has checksums of what is in it.
            whole = zipfile.ZipFile(file).testzip() is None
    if not whole:
        raise UserError(f"{path} is damaged, its checksum is another: take a copy that is whole")


def read_content(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Reads the file of a checkpoint without running anything that is in it.

    Args:
        path: The file.
        map_location: Where its tensors go, as `torch.load` takes it.

    Raises:
        UserError: If it is missing, damaged, or no checkpoint of a Lightning module.
    """
    path = Path(path).expanduser()
    try:
        _check_seal(path)
        content = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: give the path of a file, like best.ckpt") from None
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - what is no checkpoint fails in any way
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} is damaged or no checkpoint of dflows ({reason[0][:120]}): give one that "
            "`python -m dflows.fit` wrote"
        ) from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(
            f"{path} is a checkpoint of something else: give one that `python -m dflows.fit` wrote"
        )
    return content


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
) -> None:
    """Gives a module the weights of a checkpoint.

    Args:
        module: The module.
        weights: Its state.
        path: The checkpoint.
        strict: Whether all weights must be there, and no others.

    Raises:
        UserError: If they do not fit; the message names the file and the first weights that do not.
    """
    reason = _differing(module, weights)
    try:
        if reason is None:
            module.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        _, *reasons = str(error).splitlines() or [""]
        reason = reasons[0] if reasons else str(error)
    if reason is not None:
        shown = textwrap.shorten(reason, 200, placeholder=" …").rstrip(".")
        raise UserError(
            f"the weights in {path} do not fit the model: {shown}: give it the configuration that "
            "it was trained with"
        )


def _differing(module: nn.Module, weights: Mapping[str, Any]) -> str | None:
    """Says which weights differ that are one parameter of the module, if there are such."""
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first not in weights or name not in weights:
            continue
        one, other = weights[first], weights[name]
        if one.shape != other.shape or not torch.allclose(one, other, 0, 0, equal_nan=True):
            return f"{first} and {name} are one parameter of the model, and two in the checkpoint"
    return None


def rebuild(
    cls: type[M],
    content: Mapping[str, Any],
    path: str | os.PathLike[str],
    allowed: Sequence[str],
    arguments: Mapping[str, Any],
) -> M:
    """Makes the module of a checkpoint, with the weights that its constructor gives it.

    Args:
        cls: The class that was asked for.
        content: What the file holds.
        path: The file.
        allowed: Packages, other than dflows' own, whose classes may be imported.
        arguments: What the user hands to the constructor.

    Raises:
        UserError: If it is of another class, or the checkpoint does not say how it is made.
    """
    described = content.get(KEY)
    if isinstance(described, dict) and not arguments:
        module = instantiate(pl.LightningModule, described["config"], allowed, path)
        if not isinstance(module, cls):
            raise UserError(
                f"{path} holds a {type(module).__name__}, and a {cls.__name__} was asked for: call "
                f"{type(module).__name__}.load_from_checkpoint"
            )
        return module
    given = {**content.get(_HYPERPARAMETERS, {}), **arguments}
    if inspect.isabstract(cls):
        raise UserError(
            f"{path} does not say what class its module has, and {cls.__name__} is abstract: call "
            "load_from_checkpoint of the class itself"
        )
    parameters = inspect.signature(cls).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [entry for entry in parameters if entry.kind not in variadic]
    missing = [
        entry.name for entry in named if entry.default is entry.empty and entry.name not in given
    ]
    if missing:
        shown = ", ".join(f"{name}={name}" for name in missing)
        raise UserError(
            f"{path} does not say how its {cls.__name__} was made, since that was made in Python: "
            f"pass its arguments, {cls.__name__}.load_from_checkpoint(path, {shown}), or make "
            "the module and call load_state_dict(torch.load(path, weights_only=True)"
            "['state_dict'])"
        )
    if len(named) == len(parameters):
        given = {name: given[name] for name in given if name in {entry.name for entry in named}}
    unknown = set(arguments) - set(given)
    if unknown:
        raise UserError(
            f"a {cls.__name__} takes no {', '.join(sorted(unknown))}: its arguments are "
            f"{', '.join(entry.name for entry in named)}"
        )
    return cls(**given)
