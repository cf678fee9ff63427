"""Modules from checkpoints, made without running any code that is in the file."""

import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dflows.conditioner import Conditioner
from dflows.errors import UserError
from dflows.memory import check_memory
from lightning_modules.archives import check_archive
from lightning_modules.descriptions import instantiate

__all__ = ["KEY", "load_weights", "match_precision", "read_content", "rebuild", "start_weights"]

KEY = "dflows"
"""Where a checkpoint of `python -m dflows.fit` keeps the description of its model and data."""

_HYPERPARAMETERS = "hyper_parameters"
_OF_A_CONDITIONER = re.compile(r".*?\bconditioner\.")

M = TypeVar("M", bound=pl.LightningModule)


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
        check_archive(path)
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
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise UserError(
            f"{path} is a checkpoint of something else: give one that `python -m dflows.fit` wrote"
        )
    # A tensor may say of one number that it stands there any number of times.
    needed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(content))
    check_memory(needed, str(path), "give a checkpoint of a smaller model")
    return content


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yields the tensors in a tree, whose parts may be one."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value


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
    try:
        reason = _differing(module, weights)
        if reason is None:
            module.load_state_dict(weights, strict=strict)
    except Exception as error:  # noqa: BLE001 - crafted weights fail in any way
        _, *reasons = str(error).splitlines() or [""]
        reason = reasons[0] if reasons else str(error)
    if reason is not None:
        shown = textwrap.shorten(reason, 200, placeholder=" …").rstrip(".")
        raise UserError(
            f"the weights in {path} do not fit the model: {shown}: give it the configuration that "
            "it was trained with"
        )


def match_precision(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Lets a module hold weights of double precision as they are.

    Args:
        module: The module, which computes in double precision if its weights are of it.
        weights: Its state, as a checkpoint has it.
    """
    found = (weights.get(name) for name, _ in module.named_parameters())
    if any(isinstance(part, Tensor) and part.dtype == torch.float64 for part in found):
        module.double()


def start_weights(
    module: nn.Module, weights: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Gives a module the weights of another to start with: all, or else those of its networks.

    Where the two are not made alike, the conditioners of the one become those of the other, in
    their order. So a language model over lanes starts a flow over lanes, which ranks classes by the
    same network.

    Args:
        module: The module.
        weights: The state of the other.
        path: Its checkpoint.

    Raises:
        UserError: If neither all weights fit nor those of the conditioners.
    """
    own = module.state_dict()
    if {name: value.shape for name, value in own.items()} == {
        name: value.shape for name, value in weights.items()
    }:
        load_weights(module, weights, path)
        return
    found = dict.fromkeys(name[0] for name in map(_OF_A_CONDITIONER.match, weights) if name)
    wanted = [name for name, part in module.named_modules() if isinstance(part, Conditioner)]
    if not wanted or len(found) != len(wanted):
        raise UserError(
            f"the model has {len(wanted)} conditioners, and the one in {path} has {len(found)}: "
            "start from a model of as many, or of the same configuration"
        )
    for name, other in zip(wanted, found, strict=True):
        part = {
            key.removeprefix(other): value
            for key, value in weights.items()
            if key.startswith(other)
        }
        load_weights(module.get_submodule(name), part, path)


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
        described = described.get("config")
        model = described.get("model") if isinstance(described, dict) else None
        module = instantiate(pl.LightningModule, model, allowed, path)
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
