"""Configurations are read without surprises, and never without end."""

import pytest
import yaml

from dflows.cli.yaml_files import read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("plain", "plain"),
        ("a: {b: 1, c: [1, 2]}", {"a": {"b": 1, "c": [1, 2]}}),
        ("a: &x {b: 1}\nc: {<<: *x, b: 2}", {"a": {"b": 1}, "c": {"b": 2}}),
        ("a: &x [1]\nb: *x\nc: *x", {"a": [1], "b": [1], "c": [1]}),
    ],
)
def test_what_is_plain_is_read(text, value):
    assert read_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "the key a is there twice"),
        ("x: {a: 1, a: 1}", "the key a is there twice"),
        (BOMB, "its aliases unfold to more than 100,000 values"),
        ("a: &a [*a]", "an alias is inside of what it names"),
        ("a: &a {b: {c: *a}}", "an alias is inside of what it names"),
        ("[" * 100_000, "nesting depth"),
        ("".join(f"{' ' * n}a:\n" for n in range(3000)), "nesting depth"),
        ("[" * 900 + "]" * 900, "nested more than 100 deep"),
        ("- " * 900, "nested more than 100 deep"),
        ("a: [", "did not find expected"),
    ],
)
def test_what_is_not_is_refused(text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        read_yaml(text)
