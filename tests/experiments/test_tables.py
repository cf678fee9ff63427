"""The tables of the experiments, of records made by hand: every row beside its own reference."""

import re
from dataclasses import replace

import pytest

from dflows.bijections import RankPermutation
from dflows.errors import UserError
from dflows.orderings import Natural
from dflows.records import Record, read_records
from experiments.plan import Goal, Plan, Reference, Row, Smoke
from experiments.report import DRAWERS, RENDERERS
from experiments.reports import archives, benchmarks
from experiments.reports.experiment import Experiment
from experiments.reports.markdown import escaped
from tests.commands import ROOT

TASKS = {
    "full-rank": ["5x5"],
    "estimators": ["one", "two"],
    "mixture": ["grid"],
    "addition": ["D10"],
    "potts": ["side3-K3-J0.1"],
    "language-modelling": ["ptb"],
    "language-modelling-long": ["ptb"],
    "language-modelling-gpu": ["text8"],
}
ROWS = {
    "flow": Row("flow", reference="own", published={}),
    "rank-1": Row("other flow", reference="other"),
}
RUN = {
    "exact_nats": 7.7,
    "test_nats": 7.75,
    "entropy": 7.5,
    "factorized_entropy": 8.1,
    "kl": 0.2,
    "factorized_kl": 0.6,
    "accuracy": 0.25,
    "passes": 6,
    "fixed_point_iterations": 4.5,
    "steps": 1000,
    "train_seconds": 12.0,
    "test_bpc": 2.25,
    "test_bpc_stateful": 2.125,
    "passes_bpc": {"6": 2.25, "12": 2.2},
    "passes_seconds_1": {"6": 0.5, "12": 0.9},
    "level_bpc": [4.0, 0.5],
    "unigram_bpc": 4.25,
    "characters": {"test": 1000},
    "generation_length": 128,
    "generation_seconds_1": 0.5,
    "generation_seconds_32": 1.5,
    "samples": ["to be\n```\nor not", "to see"],
}
AGAIN = RUN | {"exact_nats": 7.9, "test_nats": 7.85, "kl": 0.4, "accuracy": 0.75}
GRADIENTS = {
    "gradient_cosine": 0.5,
    "gradient_norm_ratio": 1.5,
    "gradient_mixture_cosine": 0.75,
    "gradient_mixture_norm_ratio": 2.5,
    "gradient_standard_error": 0.01,
    "gradient_variance": 12.0,
}


SIZES = {"length": 2, "side": 3, "coupling": 0.1}


def trained(flows, **data):
    """The configuration of a run of so many flows."""
    given = {"class_path": "datamodules.MixtureDataModule", "init_args": {"num_classes": 2, **data}}
    return {
        "data": given,
        "model": {"init_args": {"flow": {"init_args": {"orderings": [{}] * flows}}}},
    }


def record(name, metrics, seed=0, kind="fit", config=None):
    return Record(
        name=name,
        kind=kind,
        config=config or trained(1),
        seed=seed,
        device="CPU",
        precision="32-true",
        seconds=1.0,
        parameters=1,
        metrics=metrics,
    )


def experiment(name, absent=()):
    """Makes an experiment of two rows with a reference each, of which all records lack a metric."""
    tasks = TASKS[name]
    references = {
        "own": Reference([Natural()], RankPermutation),
        "other": Reference([Natural()], RankPermutation),
    }
    rows = {
        key: Row(row.label, reference=row.reference, published={tasks[0]: 7.25})
        for key, row in ROWS.items()
    }
    found = []
    for flows, task in enumerate(tasks, 1):
        config = trained(flows, **(SIZES if name != "mixture" else {}))
        found += [
            record(f"flow-{task}", RUN, config=config),
            record(f"flow-{task}", AGAIN, 1, config=config),
            record(f"rank-1-{task}", RUN | {"probabilities": [0.25] * 4}, config=config),
            record(
                f"gradients-flow-{task}", GRADIENTS, kind="gradients", config={"trained": config}
            ),
        ]
        for key, nats in (("own", 7.6), ("other", 7.0)):
            metrics = {
                "reference_nats": nats,
                "reference_kl": nats - 6.5,
                "layerwise_nats": nats + 0.05,
            }
            # Of the tasks of estimators the first has as many transforms as one reference, and the
            # second as many as the other.
            tables = {"data": config["data"], "orderings": [""] * (1 if key == "own" else 2)}
            found.append(
                record(f"reference-{key}-{task}", metrics, kind="reference", config=tables)
            )
    kept = {}
    for one in found:
        metrics = {key: value for key, value in one.metrics.items() if key not in absent}
        kept.setdefault(one.name, []).append(replace(one, metrics=metrics))
    smoke = Smoke(tasks=tasks[:1], rows=["flow"])
    plan = Plan(name, {task: {} for task in tasks}, rows, smoke, references=references)
    return Experiment(plan, kept)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "full-rank",
            "| flow | 7.2 | 7.800 ± 0.141 (2) | 7.650 | 7.600 | +0.200 | 50% | 1,000 | 12 |",
        ),
        ("full-rank", "| other flow | 7.2 | 7.700 | 7.050 | 7.000 | +0.700 | 67% | 1,000 | 12 |"),
        ("estimators", "| flow | 7.800 ± 0.141 (2) (12 s) | 7.800 ± 0.141 (2) (12 s) |"),
        ("estimators", "| *tables, layerwise* | 7.650 | 7.050 |"),
        ("estimators", "| *best tabular flow* | 7.600 | 7.000 |"),
        ("estimators", "| flow | 0.500 | 1.5 | 0.750 | 2.5 | 0.01 | 12 |"),
        ("mixture", "| flow | 0.300 ± 0.141 (2) | 0.150 | 1.100 |"),
        ("mixture", "| other flow | 0.200 | -0.450 | 0.500 |"),
        (
            "addition",
            (
                "| flow | 7.25 | 7.8000 ± 0.0707 (2) | 50.00% ± 35.36% (2) | 1,000 ± 0 (2) | "
                "12 ± 0 (2) |"
            ),
        ),
        ("potts", "| flow | 7.25 (below the entropy) | 7.800 ± 0.141 (2) | 7.600 | +0.3000 | 6 |"),
        (
            "language-modelling",
            "| flow | 7.25 | – | 2.250 | 2.125 | – | 6 | 4.5 | 1 | 12 | 0.500 | 1.500 |",
        ),
        ("language-modelling", "    to be↵```↵or not"),
    ],
)
def test_a_row_is_the_mean_of_its_seeds_beside_its_own_reference(name, line):
    assert line in RENDERERS[name](experiment(name)).splitlines()


@pytest.mark.parametrize("name", RENDERERS)
@pytest.mark.parametrize(
    "absent",
    [
        {"reference_nats", "reference_kl"},
        {"layerwise_nats"},
        {"exact_nats", "kl"},
        {"entropy", "factorized_entropy", "factorized_kl"},
        {"train_seconds", "steps", "passes", "accuracy"},
        {"test_bpc", "test_bpc_stateful", "unigram_bpc"},
        {"samples", "characters", "generation_length", "generation_seconds_1"},
        {*GRADIENTS},
        {*RUN, *GRADIENTS},
    ],
    ids=lambda absent: min(absent),
)
def test_what_records_lack_is_a_dash(name, absent, tmp_path):
    partial = experiment(name, absent)
    text = RENDERERS[name](partial)
    assert text != RENDERERS[name](experiment(name)) or not absent & USED[name]
    assert "None" not in text
    assert "nan" not in text
    if name in DRAWERS:
        DRAWERS[name](partial, tmp_path / "figure.svg")


USED = {
    "full-rank": {"reference_nats", "layerwise_nats", "exact_nats", "entropy", "steps"},
    "estimators": {
        "reference_nats",
        "layerwise_nats",
        "exact_nats",
        "entropy",
        "train_seconds",
        *GRADIENTS,
    },
    "mixture": {"reference_kl", "kl", "entropy"},
    "addition": {"steps", "accuracy"},
    "potts": {"exact_nats", "entropy", "passes"},
    **{
        name: {
            "characters",
            "generation_seconds_1",
            "passes_bpc",
            "samples",
            "test_bpc",
            "test_bpc_stateful",
            "train_seconds",
        }
        for name in DRAWERS
        if name.startswith("language-modelling")
    },
}
"""Some of the metrics that every table shows."""


@pytest.mark.parametrize("name", RENDERERS)
def test_without_records_there_is_no_table(name):
    full = experiment(name)
    assert RENDERERS[name](Experiment(full.plan, {})) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"characters": {"test": 300}}, r"scored \[300, 1000\] characters of test"),
        ({"unigram_bpc": 3.0}, "they are of different distributions"),
    ],
)
def test_rows_of_different_texts_are_not_compared(changes, message):
    full = experiment("language-modelling")
    other = record("rank-1-ptb", RUN | changes)
    mixed = Experiment(full.plan, full.records | {"rank-1-ptb": [other]})
    with pytest.raises(UserError, match=message):
        RENDERERS["language-modelling"](mixed)


def test_few_passes_are_compared_with_many_and_flows_with_the_recipe():
    def made(name, bits, passes, seconds, objective=None, **arguments):
        one = record(
            f"{name}-ptb",
            RUN | {"test_bpc": bits, "passes": passes, "generation_seconds_1": seconds},
        )
        model = {"init_args": {"flow": {"init_args": arguments}, "objective": objective}}
        return replace(one, config={**one.config, "model": model})

    base = "dflows.bases.FactorizedBase"
    recipe = {"class_path": "dflows.objectives.EndToEnd"}
    found = {
        "told": made("told", 1.5, 12, 0.25, ngram_order=8),
        "levels": made("levels", 1.75, 12, 0.125),
        "slow": made("slow", 1.625, 128, 1.0, ngram_order=8),
        "plain": made("plain", 2.0, 128, 0.5),
        "ours": made("ours", 2.5, 12, 0.5, base={"class_path": base}),
        "paper": made("paper", 4.0, 2, 0.5, objective=recipe, base=base),
    }
    plan = Plan(
        "language-modelling",
        {"ptb": {}},
        {name: Row(name) for name in found},
        Smoke(tasks=["ptb"], rows=["told"]),
    )
    records = {f"{name}-ptb": [one] for name, one in found.items()}
    lines = RENDERERS["language-modelling"](Experiment(plan, records)).splitlines()
    begin = lines.index("| few passes | test bpc | beside | its test bpc | more bits |") + 2
    assert lines[begin : lines.index("", begin)] == [
        "| told, 12 passes | 1.500 | slow, 128 passes | 1.625 | -0.125 |",
        "| told, 12 passes | 1.500 | plain, 128 passes | 2.000 | -0.500 |",
        "| levels, 12 passes | 1.750 | plain, 128 passes | 2.000 | -0.250 |",
        "| ours, 12 passes | 2.500 | paper, 2 passes | 4.000 | -1.500 |",
    ]
    quickest = "told, 12 passes | 4.00 | told, 12 passes | 1.00 |"
    assert f"| slow, 128 passes | 1.625 | {quickest}" in lines
    quickest = "levels, 12 passes | 4.00 | told, 12 passes | 1.00 |"
    assert f"| plain, 128 passes | 2.000 | {quickest}" in lines


@pytest.mark.parametrize("proved", [True, False])
def test_archives_stand_beside_the_likelihoods_that_they_prove(proved):
    plan = Plan(
        "language-modelling", {"ptb": {}}, {"a": Row("a"), "b": Row("b")}, Smoke(["ptb"], ["a"])
    )
    metrics = RUN | {"test_bpc": 1.5}
    records = {
        "a-ptb": [record("a-ptb", metrics | ({"archive_bpc": 1.5055} if proved else {}))],
        "b-ptb": [record("b-ptb", metrics)],
    }
    lines = RENDERERS["language-modelling"](Experiment(plan, records)).splitlines()
    (head,) = (line for line in lines if line.startswith("| system | published"))
    row = next(line for line in lines if line.startswith("| a |"))
    assert ("| test bpc, windows | archive, bpc |" in head) is proved
    assert ("| 1.500 | 1.505 |" in row or "| 1.500 | 1.506 |" in row) is proved


def test_goals_stand_beside_what_was_measured():
    goals = [
        Goal("a", at_most=1.5),
        Goal("a", at_most=1.45),
        Goal("b", at_most=0.11, passes=12, above="a"),
        Goal("b", at_most=0.05, passes=6, above="a"),
        Goal("b", at_most=2.0, passes=24),  # not measured
        Goal("c", at_most=2.0),  # without a record
    ]
    rows = {name: Row(name) for name in "abc"}
    plan = Plan("x", {"ptb": {}}, rows, Smoke(["ptb"], ["a"]), goals={"ptb": goals})
    bits = {"a": {"test_bpc": 1.5}, "b": {"test_bpc": 1.575, "passes_bpc": {"12": 1.605}}}
    records = {f"{name}-ptb": [record(f"{name}-ptb", RUN | more)] for name, more in bits.items()}
    lines = RENDERERS["language-modelling"](Experiment(plan, records)).splitlines()
    begin = lines.index("| goal for | test bpc asked for | test bpc |  |") + 2
    assert lines[begin : lines.index("", begin)] == [
        "| a | at most 1.50 | 1.500 | met |",
        "| a | at most 1.45 | 1.500 | missed by 0.050 |",
        "| b, 12 passes | at most 0.11 above: a | 1.605 | met |",
        "| b, 6 passes | at most 0.05 above: a | 1.575 | missed by 0.025 |",
    ]


def test_archives_have_the_size_that_the_likelihood_says():
    folders = [folder for folder in (ROOT / "results").iterdir() if folder.is_dir()]
    found = [one for folder in folders for one in read_records(folder)]
    proved = [one for one in found if {"archive_bpc", "test_bpc"} <= one.metrics.keys()]
    assert proved
    for one in proved:
        ratio = one.metrics["archive_bpc"] / one.metrics["test_bpc"]
        # What an archive begins with counts for more of a short text.
        assert 1 < ratio <= (1.01 if one.metrics["characters"]["test"] >= 400_000 else 1.02)


HOSTILE = (
    "a | b <script>\n# `c` [d](http://e) ![f](g) $h$ &amp; _i_ **j** ~~k~~ {l}`m` www.n.o \\<p>"
)


LOOKED_UP = {"opponent", "size"}


def hostile(value):
    """The same with hostile texts behind all texts but those that records are found by."""
    if isinstance(value, dict):
        return {key: one if key in LOOKED_UP else hostile(one) for key, one in value.items()}
    if isinstance(value, list):
        return [*map(hostile, value)]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


@pytest.mark.parametrize("name", RENDERERS)
def test_no_text_of_a_record_is_markdown(name):
    made = experiment(name)
    plain = RENDERERS[name](made.escaped())
    texts = {"device": HOSTILE, "precision": HOSTILE, "budget": HOSTILE}
    found = {
        key: [replace(one, config=hostile(one.config), **texts) for one in records]
        for key, records in made.records.items()
    }
    rendered = RENDERERS[name](replace(made, records=found).escaped())
    assert _structure(rendered) == _structure(plain)


def test_no_text_of_a_benchmark_is_markdown():
    records = read_records(ROOT / "results/benchmarks")
    texts = {"device": HOSTILE, "precision": HOSTILE}
    found = [replace(one, config=hostile(one.config), **texts) for one in records]
    one_device = [replace(one, device="CPU") for one in records]
    assert _structure(benchmarks.render([*map(escaped, found)])) == _structure(
        benchmarks.render([*map(escaped, one_device)])
    )


def _structure(rendered):
    """What of a text is Markdown, line by line, without its code."""
    before, *rest = rendered.split("```text\n")
    parts = [before, *(part.partition("\n```")[2] for part in rest)]
    return [
        re.sub(r"[^|<>`*\[\]#$~\\_!{}]", "", re.sub("&#[0-9]+;", "", line))
        for part in parts
        for line in part.splitlines()
    ]


def test_archives_stand_beside_other_compressors():
    metrics = {
        "archive_bytes": 100,
        "archive_bpc": 0.8,
        "archive_seconds": 3.0,
        "characters": {"a.txt": 1000},
        "passes": 64,
        "weights_bytes": 900,
        "compressed_bytes": {"xz": 500, "gzip": 600},
        "primed_bytes": {"xz": 250, "gzip": 200},
    }
    text = archives.render([record("model-archive", metrics, kind="compress")])
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[-3:] == [
        "| model, 64 passes | – | – | 100 | 0.800 | 8.000 | 3 | – |",
        "| gzip | 600 | 4.800 | 200 | 1.600 | 4.800 | – | – |",
        "| xz | 500 | 4.000 | 250 | 2.000 | 4.000 | – | – |",
    ]
    assert archives.render([]) == ""
