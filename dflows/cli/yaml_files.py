"""YAML as every configuration is read: no key twice, and nothing that unfolds without bound."""

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

__all__ = ["MOST_VALUES", "check_yaml", "read_yaml"]

MOST_VALUES = 100_000
"""Values that a configuration may have when its aliases are written out."""

DEEPEST = 100

_parsed = get_loader("yaml")


def read_yaml(text: str) -> Any:
    """Reads the text of a configuration, or of a value on the command line.

    Args:
        text: The text.

    Raises:
        yaml.YAMLError: If it is not YAML, has a key twice, is nested too deep, or its aliases
            contain themselves or unfold to more than :data:`MOST_VALUES` values.

    Example:
        >>> read_yaml("{learning_rate: 1e-3, batch_size: 8}")
        {'learning_rate': 0.001, 'batch_size': 8}
        >>> read_yaml("{batch_size: 8, batch_size: 16}")
        Traceback (most recent call last):
        ...
        yaml.constructor.ConstructorError: the key batch_size is there twice ...
    """
    check_yaml(text)
    return _parsed(text)


def check_yaml(text: str) -> None:
    """Refuses what :func:`read_yaml` refuses.

    Args:
        text: The text.

    Raises:
        yaml.YAMLError: If it would.
    """
    if not any(sign in text for sign in ":&*,[-"):
        return
    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if root is not None:
        _count(root, {})


def _count(node: Node, known: dict[int, int | None], depth: int = 0) -> int:
    """Returns the values below a node, aliases written out; `None` marks nodes that are begun."""
    if isinstance(node, ScalarNode):
        return 1
    if depth > DEEPEST:
        raise _refused(f"it is nested more than {DEEPEST} deep", node)
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise _refused("an alias is inside of what it names", node)
        return count
    known[id(node)] = None
    if isinstance(node, MappingNode):
        _check_keys(node)
        inner = [entry for pair in node.value for entry in pair]
    else:
        inner = node.value if isinstance(node, SequenceNode) else []
    count = 1
    for entry in inner:
        count += _count(entry, known, depth + 1)
        if count > MOST_VALUES:
            raise _refused(f"its aliases unfold to more than {MOST_VALUES:,} values", node)
    known[id(node)] = count
    return count


def _check_keys(node: MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, ScalarNode) and key.value != "<<":
            if key.value in seen:
                raise _refused(f"the key {key.value} is there twice", key)
            seen.add(key.value)


def _refused(problem: str, node: Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


set_loader("yaml", read_yaml, (yaml.YAMLError,))
