"""A plan says what its experiment runs, and refuses what it cannot mean."""

import itertools
from pathlib import Path

import pytest
import yaml

from dflows.cli.configs import shipped_configs
from dflows.errors import UserError
from dflows.orderings import Natural
from experiments.plan import PLANS, read_plan

PLAN = {
    "title": "small",
    "configs": ["common.yaml"],
    "seeds": [3, 5],
    "tasks": {"2x2": {}, "2x3": {"data": {"init_args": {"num_classes": 3}}}},
    "rows": {
        "base": {"label": "a base"},
        "flow": {
            "label": "a flow",
            "configs": ["flow.yaml"],
            "config": {"model": {"init_args": {"bijection": "dflows.bijections.ModularShift"}}},
            "reference": "shift",
            "published": {"2x3": 1.5},
            "tasks": ["2x3"],
        },
    },
    "references": {
        "shift": {
            "orderings": ["dflows.orderings.Natural"],
            "bijection": "dflows.bijections.ModularShift",
        }
    },
    "smoke": {"tasks": ["2x3"], "rows": ["flow"], "config": {"trainer": {"max_steps": 1}}},
}


@pytest.fixture
def plan_of(tmp_path):
    def read(**changes):
        file = tmp_path / "plan.yaml"
        file.write_text(yaml.safe_dump(PLAN | changes), encoding="utf-8")
        return read_plan(str(file))

    return read


def test_the_grid_is_run_seed_after_seed(plan_of):
    runs = [*plan_of().runs()]
    assert [(run.name, run.seed) for run in runs] == [
        ("base-2x2", 3),
        ("base-2x3", 3),
        ("flow-2x3", 3),
        ("base-2x2", 5),
        ("base-2x3", 5),
        ("flow-2x3", 5),
    ]
    assert runs[2].configs == ("common.yaml", "flow.yaml")
    assert runs[2].overlays == (PLAN["tasks"]["2x3"], PLAN["rows"]["flow"]["config"])


def test_a_row_may_have_seeds_of_its_own(plan_of):
    rows = PLAN["rows"] | {"base": {"label": "a base", "seeds": [7]}}
    names = [(run.name, run.seed) for run in plan_of(rows=rows).runs()]
    assert names == [("base-2x2", 7), ("base-2x3", 7), ("flow-2x3", 3), ("flow-2x3", 5)]


def test_smoke_runs_its_part_once(plan_of):
    (run,) = plan_of().runs(smoke=True)
    assert (run.name, run.seed) == ("flow-2x3", 3)
    assert run.overlays[-1] == {"trainer": {"max_steps": 1}}


def test_a_run_is_a_line_of_arguments(plan_of):
    (run,) = plan_of().runs(smoke=True)
    with run.arguments() as line:
        files = [part for flag, part in itertools.pairwise(line) if flag == "--config"]
        assert files[:2] == ["common.yaml", "flow.yaml"]
        last = Path(files[-1]).read_text(encoding="utf-8")
        assert yaml.safe_load(last) == {"trainer": {"max_steps": 1}}
    assert line[-4:] == ["--seed_everything", "3", "--name", "flow-2x3"]


def test_references_are_made_of_the_choices(plan_of):
    reference = plan_of().references["shift"]
    assert reference.orderings == [Natural()]
    assert reference.bijection(5).num_classes == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"2 x 2": {}}}, "'2 x 2' cannot name a part of an experiment"),
        ({"smoke": {"tasks": ["9x9"], "rows": ["flow"]}}, "smoke.tasks names 9x9"),
        ({"smoke": {"tasks": ["2x2"], "rows": ["folw"]}}, "smoke.rows names folw: give some of"),
        ({"rows": {"base": {"lable": "a base"}}}, "rows.base has no key lable: its keys are label"),
        ({"rows": {"base": {"configs": []}}}, "rows.base lacks label"),
        ({"seed": 3}, "plan.yaml has no key seed"),
        ({"references": {}}, "rows.flow.reference names shift"),
        ({"gradients": {"trained_by": "x", "tasks": []}}, "gradients.trained_by names x"),
        ({"figure": ["folw"]}, "figure names folw: give some of base, flow"),
        ({"published": {"9x9": []}}, "published names 9x9"),
        ({"published": {"2x3": [{"label": "a", "bits": 1}]}}, "published.2x3 has no key bits"),
        ({"goals": {"2x3": [{"row": "folw", "at_most": 1}]}}, "goals.2x3 names folw"),
        (
            {"goals": {"2x3": [{"row": "flow", "at_most": 1, "above": "bass"}]}},
            "goals.2x3 names bass",
        ),
    ],
)
def test_names_of_nothing_are_refused(plan_of, changes, message):
    with pytest.raises(UserError, match=message):
        plan_of(**changes)


@pytest.mark.parametrize("file", sorted(PLANS.iterdir()), ids=lambda file: file.stem)
def test_the_plans_are_whole(file):
    plan = read_plan(file)
    assert [*plan.runs(smoke=True)]
    assert len({(run.name, run.seed) for run in plan.runs()}) == len([*plan.runs()])
    for run in plan.runs():
        for config in run.configs:
            assert Path(shipped_configs(), config).is_file()
