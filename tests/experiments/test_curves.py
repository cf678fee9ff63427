"""The figure of bits: its points are those of the records, and published ones are marked."""

import html

import pytest

from dflows.records import Record
from experiments.plan import Plan, Published, Row, Smoke
from experiments.reports.curves import bits, describe_figure, draw, seconds_of_1000
from experiments.reports.experiment import Experiment

LANES = {
    "test_bpc": 1.5,
    "passes": 64,
    "passes_bpc": {"128": 1.4, "64": 1.5},
    "passes_seconds_1": {"128": 1.0, "64": 0.5},
    "generation_length": 2000,
    "level_bpc": [4.0, 1.5, 0.5],
}
LSTM = {"test_bpc": 1.45, "passes": 256, "generation_length": 250, "generation_seconds_1": 0.5}
FLOW = "published, unreproduced: flow, 1.38 in 2 passes and 0.17 s"


def record(name, metrics, likelihood="exact"):
    return Record(
        name=name,
        kind="fit",
        config={},
        seed=0,
        device="CPU",
        precision="32-true",
        seconds=1.0,
        parameters=1,
        metrics=metrics,
        likelihood=likelihood,
    )


def experiment(figure=(), **records):
    plan = Plan(
        title="text",
        tasks={"text8": {}, "ptb": {}},
        rows={name: Row(name) for name in ("lanes", "lstm", "latent")},
        smoke=Smoke([], []),
        figure=list(figure),
        published={"ptb": [Published("flow", 1.38, 2, 0.17), Published("bound", 1.5)]},
    )
    return Experiment(plan, {f"{name}-ptb": [found] for name, found in records.items()})


def test_seconds_are_of_as_many_characters_in_every_number_of_passes():
    assert seconds_of_1000(record("lanes", LANES)) == {64: 0.25, 128: 0.5}
    assert seconds_of_1000(record("lstm", LSTM)) == {256: 2.0}
    assert seconds_of_1000(record("untimed", {"test_bpc": 1.0, "passes": 1})) == {}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (
            {"lanes": record("lanes", LANES)},
            "lanes: 1.500 in 64 passes and 0.250 s, 1.400 in 128 passes and 0.500 s",
        ),
        ({"lstm": record("lstm", LSTM)}, "lstm: 1.450 in 256 passes and 2.000 s"),
        ({"latent": record("latent", {"test_bpc": 2.5}, "bound")}, "latent: ≤ 2.500"),
    ],
)
def test_every_point_is_of_a_record(records, words, tmp_path):
    made = experiment(**records)
    assert words in describe_figure(made)
    assert FLOW in describe_figure(made)
    draw(made, tmp_path / "figure.svg")
    drawn = html.unescape((tmp_path / "figure.svg").read_text(encoding="utf-8"))
    assert f">{describe_figure(made)}<" in drawn
    # Text is drawn as paths, and each is named in a comment before them.
    assert "<!-- published, unreproduced -->" in drawn
    assert ("<!-- column of a lane, in the order of generation -->" in drawn) == (
        "lanes" in records
    )


def test_only_the_rows_of_the_figure_are_drawn():
    both = {"lanes": record("lanes", LANES), "lstm": record("lstm", LSTM)}
    assert "lstm: " in describe_figure(experiment(**both))
    assert "lstm: " not in describe_figure(experiment(["lanes"], **both))


def test_without_records_there_is_nothing_to_describe():
    assert describe_figure(experiment()).endswith("against seconds. ")


def test_a_bound_is_marked():
    assert bits(record("latent", {}, "bound"), 2.5) == "≤ 2.500"
    assert bits(record("exact", {}), 2.5) == "2.500"
    assert bits(record("latent", {}, "bound"), None) == "–"
