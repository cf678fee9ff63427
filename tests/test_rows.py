"""A model of rows of integers, from a file of NumPy through every command."""

import json
import math
import re

import numpy as np
import pytest
import torch
import yaml

import dflows
from dflows.records import read_record
from tests.commands import ROOT, run_here, small_config, write_text

ROWS = np.random.default_rng(0).integers(5, size=(60, 6)).astype("uint8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a short run, beside arrays that are like its own and not."""
    folder = tmp_path_factory.mktemp("rows")
    arrays = {
        "rows": ROWS,
        "few": np.minimum(ROWS, 2),
        "narrow": ROWS[:, :4],
        "high": np.where(np.arange(360).reshape(60, 6) == 44, 5, ROWS),
        "float": ROWS.astype(float),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    config = yaml.safe_load((ROOT / "configs" / "array.yaml").read_text(encoding="utf-8"))
    backbone = config["model"]["init_args"]["flow"]["init_args"]["backbone"]
    backbone["init_args"] |= {"width": 8, "heads": 2}
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "precision": "32-true"}
    (folder / "array.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    arguments = ("--config", folder / "array.yaml", "--data.path", folder / "rows.npy")
    more = ("--trainer.logger.save_dir", folder / "runs", "--progress_bar.refresh_rate", 0)
    assert run_here("fit", *arguments, *more) == 0
    return folder


@pytest.fixture
def run(folder):
    return folder / "runs" / "array" / "version_0"


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    assert run_here("fit", "--config", small_config(folder, write_text(folder))) == 0
    return folder / "runs" / "small" / "version_0"


def evaluated(run, folder, *more):
    """The metrics of evaluating a run."""
    quiet = ("--trainer.enable_progress_bar", "false", "--name", "some", "--record", folder)
    assert run_here("evaluate", "--checkpoint", run, *quiet, *more) == 0
    return read_record(next(folder.glob("some-*.json"))).metrics


def scores(run, array, capsys):
    """What `dflows.score` says of every row, and of the whole."""
    capsys.readouterr()
    assert run_here("score", "--checkpoint", run, array, "--format", "jsonl") == 0
    *rows, whole = map(json.loads, capsys.readouterr().out.splitlines())
    return rows, whole


class TestEvaluate:
    def test_scores_every_row_of_the_split_once(self, run, tmp_path, capsys):
        metrics = evaluated(run, tmp_path)
        fitted = read_record(next(run.glob("array-*.json"))).metrics
        assert metrics["examples"] == {"test": 6}
        assert metrics["test_nats"] == pytest.approx(fitted["test_nats"], rel=1e-6)
        assert re.search(
            rf"test, nats per row\W+{metrics['test_nats']:.4f}", capsys.readouterr().out
        )

    def test_another_file_has_the_classes_of_the_model(self, run, folder, tmp_path):
        metrics = evaluated(run, tmp_path, "--data.path", folder / "few.npy")
        assert metrics["examples"] == {"test": 6}

    def test_another_fold_too(self, run, tmp_path):
        folds = ("--data.splits.folds", 3, "--data.splits.fold", 2)
        assert evaluated(run, tmp_path, *folds)["examples"] == {"test": 20}

    def test_the_archive_of_the_rows_is_as_large_as_their_nats_say(self, run, tmp_path):
        metrics = evaluated(run, tmp_path, "--archive")
        assert metrics["archive_bytes"] >= 6 * metrics["test_nats"] / math.log(2) / 8


class TestGenerate:
    def test_lines_are_rows(self, run, tmp_path, capsys):
        assert run_here("generate", "--checkpoint", run, "--num_samples", 5, "--seed", 3) == 0
        (tmp_path / "rows.txt").write_text(capsys.readouterr().out)
        rows = np.loadtxt(tmp_path / "rows.txt", dtype=int)
        expected = dflows.load(run).sample_indices(5, seed=3)
        assert torch.equal(torch.from_numpy(rows), expected)

    def test_first_columns_may_be_given(self, run, capsys):
        assert run_here("generate", "--checkpoint", run, "--prompt", "3 0 4") == 0
        lines = capsys.readouterr().out.splitlines()
        assert all(re.fullmatch(r"3 0 4( [0-4]){3}", line) for line in lines)


class TestScore:
    def test_columns_add_up_to_rows_and_rows_to_the_whole(self, run, folder, capsys):
        rows, whole = scores(run, folder / "rows.npy", capsys)
        model = dflows.load(run)
        expected = -model.log_prob(torch.from_numpy(ROWS).long())
        assert [row["row"] for row in rows] == list(range(60))
        assert [row["nats"] for row in rows] == pytest.approx(expected.tolist(), rel=1e-5)
        sums = [sum(row["column_nats"]) for row in rows]
        assert sums == pytest.approx([row["nats"] for row in rows])
        assert whole["rows"] == 60
        assert whole["nats"] == pytest.approx(sum(sums))
        assert whole["nats_per_row"] == pytest.approx(whole["nats"] / 60)
        assert whole["bits_per_column"] == pytest.approx(whole["nats"] / 360 / math.log(2))

    def test_a_table_shows_the_most_surprising_rows(self, run, folder, tmp_path, capsys):
        rows, whole = scores(run, folder / "rows.npy", capsys)
        arguments = ("--checkpoint", run, folder / "rows.npy")
        assert run_here("score", *arguments) == 0
        shown = capsys.readouterr().out
        assert f"{whole['nats_per_row']:.4f}" in shown
        worst = sorted(rows, key=lambda row: -row["nats"])[:10]
        found = re.findall(r"│ +(\d+) │ +([\d.]+) │ (\d): (\d) \(", shown)
        assert [int(row) for row, *_ in found] == [row["row"] for row in worst]
        for (_, nats, column, value), row in zip(found, worst, strict=True):
            assert nats == f"{row['nats']:.1f}"
            assert int(column) == np.argmax(row["column_nats"])
            assert int(value) == ROWS[row["row"], int(column)]
        assert run_here("score", *arguments, "-o", tmp_path / "table.txt") == 0
        assert capsys.readouterr().out == ""
        assert f"{whole['nats_per_row']:.4f}" in (tmp_path / "table.txt").read_text("utf-8")

    def test_two_models_score_the_same_rows(self, run, folder, capsys):
        both = ("--checkpoint", run / "best.ckpt", "--compare", run / "last.ckpt")
        capsys.readouterr()
        assert run_here("score", *both, folder / "rows.npy", "--format", "jsonl") == 0
        models = [json.loads(line)["model"] for line in capsys.readouterr().out.splitlines()]
        assert models == ["best.ckpt"] * 61 + ["last.ckpt"] * 61


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (
            "evaluate",
            ("--data.path", "gone.npy"),
            "cannot read gone.npy: No such file or directory",
        ),
        ("evaluate", ("--data.path", "narrow.npy"), "narrow.npy has 4 columns, and the model"),
        ("evaluate", ("--data.path", "high.npy"), r"high.npy, row 7, column 2 .* num_classes is 5"),
        ("evaluate", ("--data.path", "float.npy"), "float.npy holds float64 values, all .* whole"),
        ("generate", ("--length", 7), "length is 7, .* rows of 6 columns, .*: leave length away"),
        ("generate", ("--window", 3), "window is 3, .* rows of 6 columns, .*: leave window away"),
        ("generate", ("--prompt", "3 5"), "the prompt, word 2: '5' is not an integer from 0 to 4"),
        ("score", ("narrow.npy",), "narrow.npy has 4 columns, and the model in .* has 6"),
        ("score", ("high.npy",), r"high.npy, row 7, column 2 \(from 0\), is 5, and num_classes is"),
        ("score", ("float.npy",), "float.npy holds float64 values"),
        ("score", ("gone.npy",), "cannot read gone.npy"),
        ("score", ("array.yaml",), "array.yaml is not a file of NumPy"),
        ("score", ("-",), "rows are read from a file .npy or .npz: name it in place of -"),
        ("score", ("rows.npy", "--format", "html"), "a page is of a text, and these are rows"),
        ("score", ("rows.npy", "--overlap", 2), "overlap is 2, and rows have no windows"),
        ("score", ("rows.npy", "--window", 6), "window is 6, and rows have no windows"),
        ("compress", ("rows.npy",), "and a text has characters or bytes: use dflows.codec"),
    ],
)
def test_what_makes_no_sense_for_rows_is_refused(
    command, arguments, message, run, folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert run_here(command, "--checkpoint", run, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_texts_and_rows_are_not_compared(run, folder, text_run, capsys):
    for pair in ((run, text_run), (text_run, run)):
        both = ("--checkpoint", pair[0], "--compare", pair[1])
        capsys.readouterr()
        assert run_here("score", *both, folder / "rows.npy") == 1
        assert "is a model of text, and the other one of rows" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["--ckpt_path", "--start"])
def test_a_run_goes_on_with_as_many_columns_alone(key, run, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    given = ("--config", "array.yaml", "--data.path", "narrow.npy", "--data.num_classes", 5)
    assert run_here("fit", *given, key, run) == 1
    assert "narrow.npy has 4 columns, and the model of the checkpoint 6" in capsys.readouterr().err


def test_a_model_needs_a_file(folder, capsys):
    assert run_here("fit", "--config", folder / "array.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("the following arguments are required: path")
