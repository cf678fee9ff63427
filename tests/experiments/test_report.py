"""The README's figures are those of the records."""

from pathlib import Path

import pytest

from dflows.errors import UserError
from dflows.records import Record, read_records, write_record
from experiments.report import PAGES, main
from experiments.reports.markdown import BEGIN, END, escape, escaped, update_page
from experiments.reports.text import render_table

ROOT = Path(__file__).parents[2]

METRICS = {
    "test_bpc": 2.5,
    "valid_bpc": 2.6,
    "unigram_bpc": 4.0,
    "bigram_bpc": 3.0,
    "characters": {"test": 1000, "valid": 900},
    "passes": 7,
    "train_seconds": 100.0,
    "characters_per_second": 12345.0,
    "generation_length": 64,
    "generation_seconds_1": 0.0123,
}


def record(**changes):
    entries = {
        "name": "quickstart",
        "kind": "fit",
        "config": {},
        "seed": 0,
        "device": "CPU",
        "precision": "32-true",
        "seconds": 1.0,
        "parameters": 1,
        "metrics": METRICS,
    }
    return Record(**(entries | changes))


def test_readme_and_records_agree():
    benchmarks = read_records(ROOT / "results/benchmarks")
    table = render_table(read_records(ROOT / "results/text"), benchmarks)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert update_page(readme, table, "README.md") == readme, "run python -m experiments.report"


@pytest.mark.parametrize("name", [name for name in PAGES if (ROOT / "results" / name).is_dir()])
def test_a_page_of_its_own_is_made_from_its_records(name):
    records = [escaped(found) for found in read_records(ROOT / "results" / name)]
    path, render = PAGES[name]
    page = (ROOT / "docs" / path).read_text(encoding="utf-8")
    assert update_page(page, render(records), path) == page, "run python -m experiments.report"


def test_a_line_of_the_table_is_a_record():
    line = render_table([record()]).splitlines()[2]
    assert line == "| `quickstart.yaml` | 7 | 2.600 | 2.500 | 0.625 | 100 | 12,345 | 0.012 | – |"


def test_a_bound_is_never_shown_as_exact():
    bound = record(name="latent", likelihood="bound")
    lines = render_table([record(), bound]).splitlines()
    assert lines[2].startswith("| `latent.yaml` | 7 | ≤ 2.600 | ≤ 2.500 | ≤ 0.625 | 100 |")
    assert lines[3].startswith("| `quickstart.yaml` | 7 | 2.600 | 2.500 | 0.625 | 100 |")
    assert lines[-1].startswith(
        "Likelihoods are exact but for the bounds, marked ≤, over all 1,000"
    )


@pytest.mark.parametrize(
    ("absent", "line"),
    [
        ({"passes", "valid_bpc"}, "| – | – | 2.500 | 0.625 | 100 | 12,345 | 0.012 | – |"),
        ({"unigram_bpc", "train_seconds"}, "| 7 | 2.600 | 2.500 | – | – | 12,345 | 0.012 | – |"),
        ({"bigram_bpc", "generation_length"}, "| 7 | 2.600 | 2.500 | 0.625 | 100 | 12,345 |"),
    ],
)
def test_what_a_record_lacks_is_a_dash(absent, line):
    metrics = {name: value for name, value in METRICS.items() if name not in absent}
    table = render_table([record(metrics=metrics)]).splitlines()
    assert table[2].startswith(f"| `quickstart.yaml` {line}")
    assert ("bigram" in table[-1]) == ("bigram_bpc" in metrics and "unigram_bpc" in metrics)
    assert ("A sequence" in table[-1]) == ("generation_length" in metrics)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({}, "the records of other have no test_bpc"),
        (METRICS | {"characters": {"test": 1}}, "different corpora"),
        (METRICS | {"characters": {"valid": 1}}, "the records of other have no characters of test"),
        ({"test_bpc": 2.0}, "the records of other have no characters of test"),
    ],
)
def test_records_that_do_not_compare_are_refused(metrics, message):
    with pytest.raises(UserError, match=message):
        render_table([record(), record(name="other", metrics=metrics)])


@pytest.mark.parametrize("speed", [{}, {"characters_per_second": 0}])
def test_a_benchmark_without_speed_is_refused(speed):
    benchmark = record(name="throughput-plain", metrics=speed)
    with pytest.raises(UserError, match="the record of throughput-plain has no characters_per_sec"):
        render_table([record()], [benchmark])


def test_texts_of_a_record_are_shown_as_they_are():
    made = escaped(record(device="CPU | <script>\n# `x`", config={"a": ["<b>", {"c": 1}]}))
    assert made.config == {"a": ["&#60;b&#62;", {"c": 1}]}
    shown = "CPU &#124; &#60;script&#62; &#35; &#96;x&#96;"
    assert render_table([made]).endswith(f"Measured on: {shown}.")
    for usual in ("AMD EPYC (64-Core), 2 threads", "bf16-mixed", "step_lm-2.5", "a.b.c_d"):
        assert escape(usual) == usual


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "results").iterdir()))
def test_our_own_records_have_nothing_to_escape_that_is_shown(folder):
    for found in read_records(ROOT / "results" / folder)[:20]:
        made = escaped(found)
        assert (made.device, made.precision, made.budget) == (
            found.device,
            found.precision,
            found.budget,
        )


def test_other_benchmarks_are_for_another_page():
    benchmark = record(name="modular-dense-27-cpu", metrics={"call_seconds": 0.1})
    assert render_table([record()], [benchmark]) == render_table([record()])


def test_a_text_without_entropy_has_no_share_of_it():
    assert "| 2.500 | – |" in render_table([record(metrics=METRICS | {"unigram_bpc": 0.0})])


def test_the_command_writes_the_table(tmp_path, capsys):
    write_record(tmp_path / "results" / "text", record())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    options = ["--results", tmp_path / "results", "--readme", readme, "--docs", tmp_path / "docs"]
    assert main([str(option) for option in options]) == 0
    assert "2.500" in readme.read_text(encoding="utf-8")
    assert "old" not in readme.read_text(encoding="utf-8")
    readme.write_text("no marks", encoding="utf-8")
    assert main([str(option) for option in options]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--reslts", "x"], "error: unrecognized arguments: --reslts x: --help lists all keys"),
        (["--results"], "error: argument --results: expected one argument"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, line, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"{line}\n")


def test_no_records_are_refused(tmp_path, capsys):
    assert main(["--results", str(tmp_path)]) == 1
    assert "holds no records: run python -m dflows.fit" in capsys.readouterr().err
