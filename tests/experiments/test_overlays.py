"""Configurations are merged, and those of records compared with a plan's."""

import pytest

from dflows.errors import UserError
from experiments.overlays import config_diff, merge_configs


def test_later_keys_win_and_others_stay(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("a: {b: 1, c: [1, 2]}\nd: 4\n", encoding="utf-8")
    second.write_text("a: {c: [3]}\n", encoding="utf-8")
    given = {"a": {"b": 5}}
    found = merge_configs([str(first), str(second)], [given, {"e": {"f": None}}])
    assert found == {"a": {"b": 5, "c": [3]}, "d": 4, "e": {"f": None}}
    found["a"]["b"] = 6
    assert given == {"a": {"b": 5}}


def test_a_class_in_the_place_of_a_name_takes_it():
    keys = merge_configs([], [{"base": "A"}, {"base": {"class_path": "B"}}])
    assert keys == {"base": {"class_path": "B"}}


def test_what_is_no_configuration_is_refused():
    with pytest.raises(UserError, match=r"no configuration missing\.yaml"):
        merge_configs(["missing.yaml"], [])


RECORDED = {
    "seed_everything": 0,
    "model": {
        "class_path": "lightning_modules.FlowModule",
        "init_args": {
            "orderings": [
                {"class_path": "dflows.orderings.Natural"},
                {"class_path": "dflows.orderings.Halves", "init_args": {"first": 1}},
            ],
            "backbone": {"class_path": "dflows.backbones.Table", "init_args": {"width": 16}},
            "base": "dflows.bases.FactorizedBase",
        },
    },
    "trainer": {"max_steps": 600},
}


@pytest.mark.parametrize(
    ("wanted", "keys"),
    [
        ({}, []),
        ({"trainer": {"max_steps": 600}, "seed_everything": 0}, []),
        ({"trainer": {"max_steps": 500}}, ["trainer.max_steps"]),
        ({"exact_states": 10}, ["exact_states"]),
        ({"trainer": {"max_time": None}}, ["trainer.max_time"]),
        ({"model": {"class_path": "lightning_modules.LanguageModel"}}, ["model"]),
        # A class by its short name, as a string, or with arguments.
        ({"model": {"init_args": {"backbone": "dflows.backbones.Table"}}}, []),
        (
            {"model": {"init_args": {"backbone": "dflows.backbones.MADE"}}},
            ["model.init_args.backbone"],
        ),
        (
            {"model": {"init_args": {"backbone": {"init_args": {"width": 8}}}}},
            ["model.init_args.backbone.init_args.width"],
        ),
        # What another class had is no argument of this one.
        ({"model": {"init_args": {"backbone": {"init_args": {"hidden": 256}}}}}, []),
        (
            {"model": {"init_args": {"orderings": ["dflows.orderings.Natural"]}}},
            ["model.init_args.orderings"],
        ),
        (
            {
                "model": {
                    "init_args": {
                        "orderings": [
                            "dflows.orderings.Natural",
                            {"class_path": "dflows.orderings.Halves", "init_args": {"first": 0}},
                        ]
                    }
                }
            },
            ["model.init_args.orderings.1.init_args.first"],
        ),
    ],
)
def test_keys_that_differ_are_named(wanted, keys):
    assert list(config_diff(RECORDED, wanted)) == keys
