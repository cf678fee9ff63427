"""Keys over configurations."""

import pytest

from dflows.errors import UserError
from dflows.experiments.overlays import laid_over


def test_later_keys_win_and_others_stay(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("a: {b: 1, c: [1, 2]}\nd: 4\n", encoding="utf-8")
    second.write_text("a: {c: [3]}\n", encoding="utf-8")
    given = {"a": {"b": 5}}
    found = laid_over([str(first), str(second)], [given, {"e": {"f": None}}])
    assert found == {"a": {"b": 5, "c": [3]}, "d": 4, "e": {"f": None}}
    found["a"]["b"] = 6
    assert given == {"a": {"b": 5}}


def test_a_class_in_the_place_of_a_name_takes_it():
    keys = laid_over([], [{"base": "A"}, {"base": {"class_path": "B"}}])
    assert keys == {"base": {"class_path": "B"}}


def test_what_is_no_configuration_is_refused():
    with pytest.raises(UserError, match=r"no configuration missing\.yaml"):
        laid_over(["missing.yaml"], [])
