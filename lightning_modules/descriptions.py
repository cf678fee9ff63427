"""Descriptions of models in checkpoints: plain values, of which nothing but a model is made.

A stranger may have written a description. So it names classes of trusted packages alone, and none
of its texts is read as a configuration, as the name of a file, or as an address.
"""

import copy
import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib import import_module
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader

from dflows.errors import UserError, chain_of
from dflows.memory import check_memory

__all__ = ["ModelParser", "check_description", "instantiate", "plain_part"]

TRUSTED = ("dflows", "datamodules", "lightning_modules", "torch.nn")
"""Packages whose classes a description may name."""

FACTORIES = "dflows.flows"
"""The module of dflows whose functions it may name, too."""

MOST_ENTRIES, DEEPEST, LONGEST = 100_000, 64, 1_000_000
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_WORD = re.compile(r"[\w+-]*")
_PLAIN = (str, int, float, bool, type(None))
_AS_IT_IS = "as-it-is"

# Texts of a description are what they say: none is parsed as YAML.
set_loader(_AS_IT_IS, lambda text: text)

M = TypeVar("M", bound=pl.LightningModule)


class ModelParser(ArgumentParser):
    """Creates a parser of models whose parts may be made by functions, as flows are."""

    def add_function_arguments(
        self, *args: Any, linked_targets: Any = None, **kwargs: Any
    ) -> list[str]:
        """Leaves away what links give, as it is done for classes, and functions refuse."""
        added: list[str] = super().add_function_arguments(*args, **kwargs)
        return added


def _entries(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields every value of a tree with the key that it stands at, and refuses what is no tree."""
    if depth > DEEPEST:
        raise UserError(f"it is nested more than {DEEPEST} deep")
    yield key, value
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if not isinstance(name, str):
                raise UserError(f"a key is {name!r}, and keys are texts")
            yield from _entries(entry, name, depth + 1)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _entries(entry, key, depth + 1)
    elif not isinstance(value, _PLAIN):
        raise UserError(f"{key} is a {type(value).__name__}, and values are plain")
    elif isinstance(value, str) and len(value) > LONGEST:
        raise UserError(f"{key} is a text of {len(value):,} characters")


def plain_values(value: Any, path: str | os.PathLike[str]) -> list[tuple[str, Any]]:
    """Returns every value of a description with its key; refuses what is none.

    Args:
        value: The description, or a part of it.
        path: The checkpoint.

    Raises:
        UserError: If it is no tree of plain values, or too large for the description of a model.
    """
    try:
        found = list(islice(_entries(value), MOST_ENTRIES + 1))
    except UserError as error:
        raise UserError(f"the description in {path} is damaged: {error}") from None
    if len(found) > MOST_ENTRIES:
        raise UserError(
            f"the description in {path} is damaged: it has over {MOST_ENTRIES:,} values"
        )
    return found


def check_description(
    config: Mapping[str, Any], allowed: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Refuses a description that names what nobody vouched for.

    Args:
        config: The parts of a configuration in a checkpoint: what is made, by its key.
        allowed: Packages that the user vouches for.
        path: The checkpoint.

    Raises:
        UserError: If it names something of another package, or what is no class; or if a text
            stands where a class or a group of keys is expected, for it would be read as the name of
            a file.
    """
    for key, value in plain_values(config, path):
        if isinstance(value, int):
            # Of whatever a number counts, a model keeps some numbers of 8 bytes each.
            check_memory(64 * abs(value), f"{path}: {key} of {value:,}", "the file is damaged")
    for part, value in config.items():
        _check_value(value, None, part, (*TRUSTED, *allowed), path)


def _check_value(
    value: Any, hint: Any, key: str, trusted: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Refuses a value that is not what its type hint says, as far as that can run or read code.

    Where there is no hint (`None`), a text is a word or names a class.
    """
    if isinstance(value, str):
        if not (_takes_text(hint) or (hint is None and _WORD.fullmatch(value))):
            _check_object(value, trusted, path)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _check_value(entry, hint, key, trusted, path)
    elif isinstance(value, Mapping):
        name = value.get("class_path")
        if name is None:
            hints = _hints(_group_of(hint))
            for inner, entry in value.items():
                _check_value(entry, hints.get(inner), inner, trusted, path)
            return
        made = _check_object(name, trusted, path)
        hints = _hints(made)
        arguments = value.get("init_args") or {}
        for inner, entry in (arguments if isinstance(arguments, Mapping) else {}).items():
            _check_value(entry, hints.get(inner), inner, trusted, path)


def _takes_text(hint: Any) -> bool:
    """Says whether a text is a value of a type, and is not read as anything else there."""
    if hint in (Any, object):
        return True
    if isinstance(hint, type) and issubclass(hint, (str, os.PathLike)):
        return True
    if get_origin(hint) is Literal:
        return True
    return any(_takes_text(entry) for entry in get_args(hint))


def _group_of(hint: Any) -> Any:
    """Returns the dataclass among the alternatives of a type hint, or `None`."""
    return next((entry for entry in (hint, *get_args(hint)) if is_dataclass(entry)), None)


def _hints(made: Any) -> dict[str, Any]:
    """Returns the type hints of the arguments of a class or function."""
    try:
        return get_type_hints(getattr(made, "__init__") if isinstance(made, type) else made)  # noqa: B009
    except Exception:  # noqa: BLE001 - of what cannot be resolved nothing is known
        return {}


def _check_object(name: Any, trusted: Sequence[str], path: str | os.PathLike[str]) -> Any:
    """Returns the object of a name; refuses one that is not defined in a trusted package."""
    if not (isinstance(name, str) and _IMPORT_PATH.fullmatch(name)):
        shown = textwrap.shorten(repr(name), 80, placeholder=" …")
        raise UserError(f"{path} names the class {shown}: a class is named package.Class")
    package = next((entry for entry in trusted if _within(name, entry)), None)
    if package is None:
        raise _untrusted(name, name.split(".", maxsplit=1)[0], path)
    found = _resolve(name, package)
    defined = getattr(found, "__module__", None) or ""
    if isinstance(found, type):
        if not any(_within(defined, entry) for entry in trusted):
            raise _untrusted(name, defined.split(".")[0], path)
        return found
    others = set(trusted) - set(TRUSTED)
    known = defined == FACTORIES or any(_within(defined, entry) for entry in others)
    if not (isinstance(found, FunctionType) and known):
        raise UserError(
            f"{path} names {name}, which is no class that a model is made of: give a checkpoint "
            "that `python -m dflows.fit` wrote"
        )
    return found


def _untrusted(name: str, package: str, path: str | os.PathLike[str]) -> UserError:
    return UserError(
        f"{path} names the class {name}, and loading it would run the package {package}: add "
        f"--allow {package} if you trust that, in Python allow=[{package!r}]"
    )


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _resolve(name: str, package: str) -> Any:
    """Returns what a name in a trusted package means, or `None`.

    Only modules of that package are imported, and none is reached through another's name for it.
    """
    try:
        found: Any = import_module(package)
        for part in name.removeprefix(package).split(".")[1:]:
            inner = f"{found.__name__}.{part}" if isinstance(found, ModuleType) else None
            if inner is not None and not hasattr(found, part):
                found = import_module(inner)
                continue
            found = getattr(found, part)
            if isinstance(found, ModuleType) and found.__name__ != inner:
                return None
    except (ImportError, AttributeError):
        return None
    return found


def instantiate(
    base: type[M],
    config: Mapping[str, Any],
    allowed: Sequence[str],
    path: str | os.PathLike[str],
) -> M:
    """Makes the module that a checkpoint describes.

    Args:
        base: What it must be an instance of.
        config: The configuration in the checkpoint; its `model` has `class_path` and `init_args`.
        allowed: Packages, other than dflows' own, whose classes may be imported.
        path: The checkpoint.

    Raises:
        UserError: If it is not to be trusted, or describes no model.
    """
    with _refusing(path, "model"):
        parser, parsed = _parse(base, "model", config, allowed, path)
        module: M = parser.instantiate_classes(parsed).model
    return module


def plain_part(
    base: type,
    part: str,
    config: Mapping[str, Any],
    allowed: Sequence[str],
    path: str | os.PathLike[str],
) -> dict[str, Any]:
    """Returns a part of a description in plain types, fit to be read as a configuration.

    Args:
        base: The class that the part describes an instance of.
        part: Its key in the configuration.
        config: The configuration in the checkpoint.
        allowed: Packages, other than dflows' own, whose classes may be imported.
        path: The checkpoint.

    Raises:
        UserError: If it is not to be trusted, or a text in it would be read as a configuration.
    """
    with _refusing(path, part):
        _, parsed = _parse(base, part, config, allowed, path)
        plain: dict[str, Any] = _plain(parsed[part])
    for key, value in plain_values(plain, path):
        if isinstance(value, str) and not isinstance(_read(value), str | int | float | None):
            raise UserError(f"{path} describes no {part}: {key} is a text that holds keys of YAML")
    return plain


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


def _parse(
    base: type,
    part: str,
    config: Mapping[str, Any],
    allowed: Sequence[str],
    path: str | os.PathLike[str],
) -> tuple[ArgumentParser, Namespace]:
    """Parses a part of a description, none of whose texts is read as anything else."""
    check_description({part: config.get(part)}, allowed, path)
    parser = ModelParser(exit_on_error=False, parser_mode=_AS_IT_IS)
    # An argument of this kind takes no file, as add_subclass_arguments does.
    parser.add_argument(f"--{part}", type=base, required=True)
    # Parsing changes its argument.
    parsed = parser.parse_object({part: copy.deepcopy(config.get(part))})
    return parser, parsed


@contextmanager
def _refusing(path: str | os.PathLike[str], part: str) -> Iterator[None]:
    """Says of whatever fails in one line that the checkpoint is to blame."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a crafted description fails in any way
        chain = list(chain_of(error))
        reason = next((cause for cause in chain if isinstance(cause, UserError)), chain[-1])
        shown = textwrap.shorten(str(reason) or type(reason).__name__, 300, placeholder=" …")
        if str(path) not in shown:
            shown = f"{path} describes no {part} that this dflows can make: {shown}"
        raise UserError(shown) from None


def _plain(value: Any) -> Any:
    """Returns parsed values as plain ones, objects by the names that they were found by."""
    if isinstance(value, Namespace):
        return {key: _plain(entry) for key, entry in vars(value).items()}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(entry) for entry in value]
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, _PLAIN) else repr(value)
