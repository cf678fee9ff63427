"""Descriptions of models in checkpoints: plain values, of which nothing but a model is made.

A stranger may have written a description. So it is a tree of plain values of bounded size; what it
names is a class of a trusted package, of the kind that the annotation at its place asks for; and
its texts are texts, never read as a configuration, the name of a file or an address. All of it is
looked through before anything is made.
"""

import dataclasses
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from importlib import import_module
from pathlib import PurePath
from types import FunctionType, ModuleType, NoneType, UnionType
from typing import (
    Any,
    Literal,
    NewType,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from torch import nn

from dflows.errors import UserError, chain_of
from dflows.memory import bounded

__all__ = ["check_description", "check_plain", "instantiate"]

TRUSTED = ("dflows", "datamodules", "lightning_modules", "torch.nn")
"""Packages whose classes a description may name."""

FUNCTIONS = ("dflows.flows", "torch.nn.functional")
"""Modules whose functions it may name: those that make flows, and activations."""

MOST_VALUES, DEEPEST, LONGEST = 100_000, 64, 1_000_000
"""Values of a description, their depth, and the characters of a text."""

CLASS_PATH, GIVEN = "class_path", ("init_args", "dict_kwargs")
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_STRUCTURED = re.compile(r"[\[\]{}:&*!]|^\s*-")
_SCALARS = (bool, int, float, str)

T = TypeVar("T")
Make: TypeAlias = Callable[[], Any]
"""Makes what a part of a description says."""


def instantiate(
    base: type[T], description: Any, allowed: Sequence[str], path: str | os.PathLike[str]
) -> T:
    """Makes what a checkpoint describes.

    Args:
        base: What it must be an instance of.
        description: `class_path` and `init_args`, as the configuration in the checkpoint has them.
        allowed: Packages, other than dflows' own, whose classes may be imported.
        path: The checkpoint.

    Raises:
        UserError: If the description is not to be trusted, or cannot be made.
    """
    with _refusing(path, base):
        check_plain(description, path)
        make = _Reader(allowed, path).read("", description, base)
        with bounded("what it describes", "give a checkpoint of a smaller model"):
            made: T = make()
    return made


def check_description(
    base: type, description: Any, allowed: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Refuses what :func:`instantiate` does not trust, and makes nothing.

    Args:
        base: What an instance of is described.
        description: `class_path` and `init_args`, as the configuration in the checkpoint has them.
        allowed: Packages, other than dflows' own, whose classes may be imported.
        path: The checkpoint.

    Raises:
        UserError: If the description is not to be trusted.
    """
    with _refusing(path, base):
        check_plain(description, path)
        _Reader(allowed, path).read("", description, base)


def check_plain(description: Any, path: str | os.PathLike[str]) -> None:
    """Refuses what is no tree of plain values, or too large to describe a model.

    Args:
        description: What a checkpoint has in the place of a configuration.
        path: The checkpoint.

    Raises:
        UserError: If it is none.
    """
    waiting, count = [(description, 0)], 1
    while waiting:
        value, depth = waiting.pop()
        inner: Sequence[Any] = ()
        if isinstance(value, Mapping):
            if not all(isinstance(name, str) for name in value):
                raise UserError(f"the description in {path} has a key that is no text")
            inner = [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            inner = value
        elif type(value) not in (*_SCALARS, NoneType):
            raise UserError(f"the description in {path} has a {type(value).__name__}")
        elif isinstance(value, str) and len(value) > LONGEST:
            raise UserError(f"the description in {path} has a text of {len(value):,} characters")
        count += len(inner)
        if count > MOST_VALUES:
            raise UserError(f"the description in {path} has over {MOST_VALUES:,} values")
        if inner and depth == DEEPEST:
            raise UserError(f"the description in {path} is nested more than {DEEPEST} deep")
        waiting += [(entry, depth + 1) for entry in inner]


@contextmanager
def _refusing(path: str | os.PathLike[str], base: type) -> Iterator[None]:
    """Says of whatever fails, on one line, that the checkpoint is to blame."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a crafted description fails in any way
        chain = list(chain_of(error))
        reason = next((cause for cause in chain if isinstance(cause, UserError)), chain[-1])
        shown = textwrap.shorten(str(reason) or type(reason).__name__, 300, placeholder=" …")
        if str(path) not in shown:
            shown = f"{path} describes no {base.__name__} that this dflows can make: {shown}"
        raise UserError(shown) from None


class _Reader:
    """Creates what reads descriptions: it says how to make what they say, and makes nothing.

    Args:
        allowed: Packages that the user vouches for.
        path: The checkpoint.
    """

    def __init__(self, allowed: Sequence[str], path: str | os.PathLike[str]) -> None:
        self._allowed = tuple(allowed)
        self._path = path

    def read(self, key: str, value: Any, expected: Any) -> Make:
        """Reads a value.

        Args:
            key: Its place.
            value: The value.
            expected: The annotation there.

        Returns:
            What makes it.

        Raises:
            UserError: If it is not what is expected, or not to be trusted.
        """
        kinds = list(_alternatives(expected))
        if isinstance(value, Mapping) and CLASS_PATH in value:
            return self._object(key, value, kinds)
        if isinstance(value, str) and _NAME.fullmatch(value):
            named = [kind for kind in kinds if (get_origin(kind) or kind) in (Callable, type)]
            if named and (make := self._named(key, value, named)) is not None:
                return make
        refused = UserError(f"{key or 'it'} is {_shown(value)}, and takes {_shown_kinds(kinds)}")
        if isinstance(value, str) and _would_be_parsed(value, kinds):
            raise refused
        for kind in kinds:
            try:
                make = self._plain(key, value, kind)
            except UserError as error:  # of a part of it
                refused = error
                continue
            if make is not None:
                return make
        raise refused

    def _plain(self, key: str, value: Any, kind: Any) -> Make | None:
        """Reads a value without a class, or returns nothing if it is not of a kind."""
        origin = get_origin(kind) or kind
        if origin is Literal:
            same = (value == one and type(value) is type(one) for one in get_args(kind))
            return partial(_same, value) if any(same) else None
        if isinstance(value, Mapping):
            return self._mapping(key, value, kind, origin)
        if isinstance(value, (list, tuple)):
            return self._list(key, value, kind, origin)
        if origin is Any:
            # Where a configuration is read again, a text that nothing expects may be parsed.
            structured = isinstance(value, str) and _STRUCTURED.search(value)
            return None if structured else partial(_same, value)
        if value is None or not inspect.isclass(origin):
            return partial(_same, value) if value is None and origin is NoneType else None
        if isinstance(value, str) and issubclass(origin, Enum):
            return partial(origin.__getitem__, value)
        for scalar in _SCALARS:
            whole = scalar is float and type(value) is int
            if issubclass(origin, scalar) and (type(value) is scalar or whole):
                return partial(origin, value)
        return partial(origin, value) if issubclass(origin, PurePath) else None

    def _mapping(self, key: str, value: Mapping[str, Any], kind: Any, origin: Any) -> Make | None:
        if dataclasses.is_dataclass(origin):
            return self._call(key, origin, value)
        if origin is not Any and not (inspect.isclass(origin) and issubclass(dict, origin)):
            return None
        of = (get_args(kind) or (Any,))[-1]
        makes = {name: self.read(f"{key}.{name}", entry, of) for name, entry in value.items()}
        return partial(_mapping_of, makes)

    def _list(self, key: str, value: Sequence[Any], kind: Any, origin: Any) -> Make | None:
        made = origin if origin in (tuple, set, frozenset) else list
        if origin is not Any and not (inspect.isclass(origin) and issubclass(made, origin)):
            return None
        each = list(get_args(kind)) or [Any]
        if origin is not tuple or each[-1] is ... or not get_args(kind):
            each = each[:1] * len(value)
        if len(each) != len(value):
            return None
        pairs = enumerate(zip(value, each, strict=True))
        makes = [self.read(f"{key}.{number}", entry, one) for number, (entry, one) in pairs]
        return partial(_list_of, made, makes)

    def _object(self, key: str, value: Mapping[str, Any], kinds: Sequence[Any]) -> Make:
        """Reads the description of an object, or of a factory of such."""
        name = value[CLASS_PATH]
        arguments: dict[str, Any] = {}
        if unknown := value.keys() - {CLASS_PATH, *GIVEN}:
            raise UserError(f"{key or 'it'} has {', '.join(sorted(unknown))} beside {CLASS_PATH}")
        for part in GIVEN:
            arguments.update(value.get(part) or {})
        found = self._resolve(name)
        for kind in kinds:
            origin = get_origin(kind) or kind
            if origin is Callable:
                made = (get_args(kind) or (None,))[-1]
                if any(_makes(found, one) for one in _alternatives(made)):
                    return partial(partial, self._call(key, found, arguments))
            elif _makes(found, nn.Module if origin is Any else origin):
                return self._call(key, found, arguments)
        raise UserError(f"{key or 'it'} is a {name}, and takes {_shown_kinds(kinds)}")

    def _named(self, key: str, name: str, kinds: Sequence[Any]) -> Make | None:
        """Reads the name of a class or function where one is expected; nothing if it is none."""
        classes = [get_args(kind)[0] for kind in kinds if get_origin(kind) is type]
        try:
            found = self._resolve(name)
        except UserError:
            return None
        if any(_makes(found, kind) for kind in classes) and inspect.isclass(found):
            return partial(_same, found)
        factories = [kind for kind in kinds if get_origin(kind) is Callable]
        if factories and inspect.isfunction(found):
            return partial(_same, found)
        return self._object(key, {CLASS_PATH: name}, factories) if factories else None

    def _call(self, key: str, made: Any, arguments: Mapping[str, Any]) -> "_Call":
        """Reads the arguments of a class or function."""
        annotations, open_ended = _parameters(made)
        makes = {}
        for name, entry in arguments.items():
            if name not in annotations and not open_ended:
                raise UserError(f"{key or 'it'} has {name}, which {made.__name__} does not take")
            place = f"{key}.{name}" if key else name
            makes[name] = self.read(place, entry, annotations.get(name, Any))
        return _Call(made, makes)

    def _resolve(self, name: Any) -> Any:
        """Returns the class or function that a name means.

        Raises:
            UserError: If its package, or that of its definition, is not trusted; or there is none.
        """
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise UserError(f"it names the class {_shown(name)}, and names are package.Class")
        trusted = (*TRUSTED, *self._allowed)
        package = next((entry for entry in trusted if _within(name, entry)), None)
        if package is None:
            raise self._untrusted(name, name.partition(".")[0])
        found = _find(name, package)
        defined = getattr(found, "__module__", None) or ""
        if isinstance(found, type):
            if not any(_within(defined, entry) for entry in trusted):
                raise self._untrusted(name, defined.partition(".")[0])
            return found
        vouched = defined in FUNCTIONS or any(_within(defined, entry) for entry in self._allowed)
        if not (isinstance(found, FunctionType) and vouched):
            raise UserError(f"it names {name}, which is no class that a model is made of")
        return found

    def _untrusted(self, name: str, package: str) -> UserError:
        return UserError(
            f"{self._path} names the class {name}, and loading it would run the package {package}: "
            f"add --allow {package} if you trust that, in Python allow=[{package!r}]"
        )


@dataclasses.dataclass(frozen=True)
class _Call:
    """Creates a call of a class or function; what it is given is made anew in every call."""

    made: Callable[..., Any]
    makes: Mapping[str, Make]

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.made(*given, **(_mapping_of(self.makes) | named))


def _same(value: Any) -> Any:
    return value


def _mapping_of(makes: Mapping[str, Make]) -> dict[str, Any]:
    return {name: make() for name, make in makes.items()}


def _list_of(made: Callable[[list[Any]], Any], makes: Sequence[Make]) -> Any:
    return made([make() for make in makes])


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _find(name: str, package: str) -> Any:
    """Returns what a name in a trusted package means, or `None`.

    Only modules of that package are imported, and none is reached through another's name for it.
    """
    try:
        found: Any = import_module(package)
        for part in name.removeprefix(package).split(".")[1:]:
            if not isinstance(found, ModuleType | type):
                return None
            inner = f"{found.__name__}.{part}" if isinstance(found, ModuleType) else None
            if inner is not None and not hasattr(found, part):
                import_module(inner)
            found = getattr(found, part)
            if isinstance(found, ModuleType) and found.__name__ != inner:
                return None
    except (ImportError, AttributeError):
        return None
    return found


def _would_be_parsed(value: str, kinds: Sequence[Any]) -> bool:
    """Says whether a text becomes a list or mapping where a configuration is read again."""
    structures = (list, tuple, dict, Mapping, Sequence)
    if not any((get_origin(kind) or kind) in structures for kind in kinds):
        return False
    try:
        return isinstance(yaml.safe_load(value), (list, dict))
    except (yaml.YAMLError, ValueError, RecursionError):
        return False


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yields the kinds that an annotation allows, `Any` where nothing is known."""
    if get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _alternatives(one)
    elif isinstance(annotation, NewType):
        yield from _alternatives(annotation.__supertype__)
    elif annotation in (object, inspect.Parameter.empty) or isinstance(annotation, (str, TypeVar)):
        yield Any
    else:
        yield NoneType if annotation is None else annotation


def _makes(found: Any, kind: Any) -> bool:
    """Says whether a class is one of a kind, or a function returns such."""
    kind = get_origin(kind) or kind
    if not isinstance(found, type):
        returned = _hints(found).get("return")
        return any(isinstance(one, type) and _makes(one, kind) for one in _alternatives(returned))
    return isinstance(kind, type) and kind is not NoneType and issubclass(found, kind)


def _parameters(made: Any) -> tuple[dict[str, Any], bool]:
    """Returns the annotations of arguments by name, and whether there may be others.

    Where a constructor hands others on, those of the class it derives from are arguments too.
    """
    found: dict[str, Any] = {}
    owners = made.__mro__[:-1] if isinstance(made, type) else [made]
    for owner in owners:
        function = vars(owner).get("__init__") if isinstance(owner, type) else owner
        if function is None:
            continue
        hints, parameters = _hints(function), inspect.signature(function).parameters.values()
        for entry in parameters:
            if entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY):
                found.setdefault(entry.name, hints.get(entry.name, Any))
        if not any(entry.kind is entry.VAR_KEYWORD for entry in parameters):
            return found, False
    return found, True


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except Exception:  # noqa: BLE001 - annotations may name what is imported for checkers alone
        return dict(getattr(function, "__annotations__", {}))


def _shown(value: Any) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" …")


def _shown_kinds(kinds: Sequence[Any]) -> str:
    return " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
