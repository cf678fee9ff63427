"""The README's figures are those of the records."""

from pathlib import Path

import pytest

from dflows.errors import UserError
from dflows.records import Record, read_records, write_record
from dflows.report import BEGIN, END, main, render_table, update_readme

ROOT = Path(__file__).parents[1]

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
    assert update_readme(readme, table) == readme, "run python -m dflows.report"


def test_a_line_of_the_table_is_a_record():
    line = render_table([record()]).splitlines()[2]
    assert line == "| `quickstart.yaml` | 7 | 2.600 | 2.500 | 0.625 | 100 | 12,345 | 0.012 | – |"


@pytest.mark.parametrize(
    ("metrics", "message"),
    [({}, "no test_bpc"), (METRICS | {"characters": {"test": 1}}, "different corpora")],
)
def test_records_that_do_not_compare_are_refused(metrics, message):
    with pytest.raises(UserError, match=message):
        render_table([record(), record(name="other", metrics=metrics)])


def test_the_command_writes_table_and_figure(tmp_path, capsys):
    write_record(tmp_path / "results", record())
    readme, figure = tmp_path / "README.md", tmp_path / "figures/text.svg"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    options = ["--results", tmp_path / "results", "--benchmarks", tmp_path / "none"]
    options += ["--readme", readme, "--figure", figure]
    assert main([str(option) for option in options]) == 0
    assert "2.500" in readme.read_text(encoding="utf-8")
    assert "old" not in readme.read_text(encoding="utf-8")
    assert figure.read_text(encoding="utf-8").startswith("<?xml")
    readme.write_text("no marks", encoding="utf-8")
    assert main([str(option) for option in options]) == 1
    assert capsys.readouterr().err.count("\n") == 1
