"""Which keys of a record are not those of a plan."""

import pytest

from dflows.experiments.agreement import disagreements

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
    assert list(disagreements(RECORDED, wanted)) == keys
