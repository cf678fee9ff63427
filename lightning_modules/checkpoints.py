"""Modules from checkpoints, made without running any code that is in the file."""

import copy
import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from torch import nn

from dflows.errors import UserError

__all__ = [
    "KEY",
    "ModelParser",
    "check_trusted",
    "import_object",
    "import_paths",
    "instantiate",
    "load_weights",
    "read_content",
    "rebuild",
]

KEY = "dflows"
"""Where a checkpoint of `python -m dflows.fit` keeps the description of its model and data."""

TRUSTED = ("dflows", "datamodules", "lightning_modules", "torch.nn")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_HYPERPARAMETERS = "hyper_parameters"

M = TypeVar("M", bound=pl.LightningModule)


class ModelParser(ArgumentParser):
    """Creates a parser of models whose parts may be made by functions, as flows are."""

    def add_function_arguments(
        self, *args: Any, linked_targets: Any = None, **kwargs: Any
    ) -> list[str]:
        """Leaves away what links give, as it is done for classes, and functions refuse."""
        added: list[str] = super().add_function_arguments(*args, **kwargs)
        return added


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
        content = torch.load(path, map_location=map_location, weights_only=True)
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
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(
            f"{path} is a checkpoint of something else: give one that `python -m dflows.fit` wrote"
        )
    return content


def import_object(name: str) -> Any:
    """Returns what an import path names, which must be trusted.

    Args:
        name: The path, as `dflows.flows.strided`.
    """
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def import_paths(value: Any, *, everywhere: bool, key: str = "") -> Iterator[str]:
    """Finds the import paths in a configuration.

    Args:
        value: The configuration, or a part of it.
        everywhere: Whether every text that may be one counts, not only a `class_path`.
        key: The key of the part.

    Yields:
        Import paths.
    """
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from import_paths(entry, everywhere=everywhere, key=str(name))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from import_paths(entry, everywhere=everywhere, key=key)
    elif isinstance(value, str) and (
        key == "class_path" or (everywhere and _IMPORT_PATH.fullmatch(value))
    ):
        yield value


def check_trusted(
    config: Mapping[str, Any], allowed: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Refuses a configuration that names classes of packages which nobody vouched for.

    Loading it would import them, and so run their code.

    Args:
        config: The configuration in a checkpoint.
        allowed: Packages that the user vouches for.
        path: The checkpoint.

    Raises:
        UserError: If it names another.
    """
    trusted = (*TRUSTED, *allowed)
    named = [
        *import_paths(config.get("model"), everywhere=True),
        *import_paths(config.get("data"), everywhere=False),
    ]
    for name in named:
        if not any(name == package or name.startswith(f"{package}.") for package in trusted):
            package = name.split(".")[0]
            raise UserError(
                f"{path} names the class {name}, and loading it would run its package: add "
                f"--allow {package} if you trust that, in Python allow=[{package!r}]"
            )


def instantiate(base: type[M], model: Mapping[str, Any]) -> M:
    """Makes a module of its configuration, which must be trusted.

    Args:
        base: What it must be an instance of.
        model: The configuration: `class_path` and `init_args`.
    """
    parser = ModelParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "model", required=True)
    # Parsing changes its argument.
    parsed = parser.parse_object({"model": copy.deepcopy(dict(model))})
    module: M = parser.instantiate_classes(parsed).model
    return module


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
        check_trusted(described["config"], allowed, path)
        module = instantiate(pl.LightningModule, described["config"]["model"])
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
