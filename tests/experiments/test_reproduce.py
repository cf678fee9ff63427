"""``python -m experiments.reproduce``: every experiment runs, and its records make its tables."""

import html
import shutil

import pytest

from dflows.records import read_records
from experiments.overlays import config_diff, merge_configs
from experiments.plan import reference_name
from experiments.references import reference_settings
from experiments.report import DRAWERS, RENDERERS
from experiments.report import main as report
from experiments.reports import curves, estimators, mixture
from experiments.reports.experiment import read_experiment
from experiments.reports.markdown import BEGIN, END, update_page
from experiments.reproduce import EXPERIMENTS, main
from tests.commands import ROOT

DESCRIBED = {
    "estimators": estimators.describe_figure,
    "mixture": mixture.describe_figure,
    "language-modelling": curves.describe_figure,
    "language-modelling-long": curves.describe_figure,
    "language-modelling-gpu": curves.describe_figure,
}


@pytest.fixture(scope="module", params=EXPERIMENTS)
def ran(request, tmp_path_factory):
    """The folder in which an experiment's smoke has run."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([request.param, "--smoke"]) == 0
    return request.param, folder


def test_every_run_has_a_record_and_the_report_a_page(ran, monkeypatch, capsys):
    name, folder = ran
    monkeypatch.chdir(folder)
    records = read_records(folder / "results" / f"{name}-smoke")
    assert {"fit"} <= {record.kind for record in records}
    for record in records:
        if record.kind == "fit" and "exact_nats" in record.metrics:
            assert record.metrics["exact_nats"] > record.metrics["entropy"] - 1e-6
    # No page shows what a smoke leaves: it has to be asked for.
    assert report([]) == 1
    shutil.copytree(folder / "results" / f"{name}-smoke", folder / "results" / name)
    page = folder / "docs" / "experiments" / f"{name}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    assert report([]) == 0
    table = page.read_text(encoding="utf-8")
    assert table.count("\n| ") > 2
    # What is there is kept, and is of the plan.
    capsys.readouterr()
    assert main([name, "--smoke"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("kept: ") == len(records)
    assert "is not the plan's" not in printed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fullrank"], 1, "no experiment fullrank: give one of full-rank, estimators"),
        (["potts", "--smok"], 2, "--smok"),
        (["potts", "--only", "nonsense"], 1, "nothing of potts matches nonsense"),
        (["potts", "--only", "flow-side3-K3-J0.1-1"], 1, "nothing of potts matches flow-side3-K3"),
        ([], 2, "name"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, code, message, capsys):
    assert main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_overlay_changes_every_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("trainer: {max_steps: 3, val_check_interval: 3}\n", encoding="utf-8")
    line = ["potts", "--smoke", "--only", "factorized*-0", "--overlay", str(overlay)]
    assert main(line) == 0
    (found,) = read_records(tmp_path / "results" / "potts-smoke")
    assert found.metrics["steps"] == 3


def test_an_overlay_changes_what_has_no_run_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("data: {init_args: {seed: 7}}\n", encoding="utf-8")
    line = ["full-rank", "--smoke", "--only", "*autoregressive-rank-2x2"]
    assert main([*line, "--overlay", str(overlay)]) == 0
    (found,) = read_records(tmp_path / "results" / "full-rank-smoke")
    assert found.config["data"]["init_args"]["seed"] == 7
    # A run without it is of another distribution, and no table compares the two.
    assert main(["full-rank", "--smoke", "--only", "autoregressive-flow-rank-2x2"]) == 0
    (tmp_path / "results" / "full-rank-smoke").rename(tmp_path / "results" / "full-rank")
    page = tmp_path / "docs" / "experiments" / "full-rank.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    capsys.readouterr()
    assert report([]) == 1
    assert "they are of different distributions" in capsys.readouterr().err


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The pages of experiments, made anew from the records."""
    folder = tmp_path_factory.mktemp("reported")
    for part in ("docs/experiments", "docs/figures", "docs/guide", "results"):
        shutil.copytree(ROOT / part, folder / part)
    shutil.rmtree(folder / "results" / "text")
    options = ["--results", folder / "results", "--docs", folder / "docs"]
    assert report([str(option) for option in options]) == 0
    return folder


@pytest.mark.parametrize("name", [name for name in RENDERERS if (ROOT / "results" / name).is_dir()])
def test_pages_and_records_agree(name, reported):
    page = f"docs/experiments/{name}.md"
    ours = (ROOT / page).read_text(encoding="utf-8")
    assert update_page(ours, "", page) != ours
    assert (reported / page).read_text(encoding="utf-8") == ours, "run python -m experiments.report"


TEXT = "data.init_args.source"
"""Where a text comes from is the user's own: the plans name the hub's."""


@pytest.mark.parametrize(
    "name", [name for name in EXPERIMENTS if (ROOT / "results" / name).is_dir()]
)
def test_records_are_of_their_plan(name):
    experiment = read_experiment(name, ROOT / "results")
    for run in experiment.plan.runs():
        for record in experiment.of(run.row, run.task):
            if record.seed == run.seed:
                keys = [*config_diff(record.config, run.keys)]
                assert [key for key in keys if not key.startswith(TEXT)] == [], record.name


@pytest.mark.parametrize(
    "name", [name for name in EXPERIMENTS if (ROOT / "results" / name).is_dir()]
)
def test_references_are_of_their_plan(name):
    experiment = read_experiment(name, ROOT / "results")
    plan = experiment.plan
    for task, keys in plan.tasks.items():
        for reference in plan.references:
            for record in experiment.records.get(reference_name(reference, task), []):
                config = merge_configs(plan.configs, [keys])["data"]
                classes = record.config["data"]["init_args"]["num_classes"]
                settings = reference_settings(plan, reference, task, classes, config)
                assert [*config_diff(record.config, settings)] == [], record.name


@pytest.mark.parametrize("name", [name for name in DRAWERS if (ROOT / "results" / name).is_dir()])
def test_figures_and_records_agree(name):
    figure = (ROOT / "docs" / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    description = DESCRIBED[name](read_experiment(name, ROOT / "results"))
    assert f">{description}<" in html.unescape(figure), "run python -m experiments.report"
