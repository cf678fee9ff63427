"""``python -m dflows.evaluate`` from a checkpoint alone."""

import pytest
import torch

from dflows.records import read_record
from tests.commands import ODD, finished_run, run_apart, run_here, small_config, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    return finished_run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def fitted(run):
    return read_record(run / "small-1.json").metrics


@pytest.mark.parametrize("split", ["test", "valid"])
def test_the_checkpoint_alone_gives_the_figures_of_its_run(
    run, fitted, split, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = ("--checkpoint", run / "best.ckpt", "--split", split, "--record", "records")
    assert run_here("evaluate", *arguments) == 0
    record = read_record(tmp_path / "records" / f"small-{split}-1.json")
    assert record.kind == "evaluate"
    assert record.metrics[f"{split}_bpc"] == pytest.approx(fitted[f"{split}_bpc"], rel=1e-6)
    assert record.metrics["characters"] == {split: 300}
    assert f"{record.metrics[f'{split}_bpc']:.4f}" in capsys.readouterr().out
    if split == "test":
        assert record.metrics["residual_bpc"] == fitted["residual_bpc"]


def test_a_run_in_double_precision_is_scored_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path, write_text(tmp_path), precision="64-true")
    assert run_here("fit", "--config", config, "--record", "records") == 0
    run = tmp_path / "runs" / "small" / "version_0"
    assert run_here("evaluate", "--checkpoint", run, "--record", "records") == 0
    fitted = read_record(tmp_path / "records" / "small-1.json")
    tested = read_record(tmp_path / "records" / "small-test-1.json")
    assert tested.precision == fitted.precision == "64-true"
    assert tested.metrics["test_bpc"] == fitted.metrics["test_bpc"]
    more = ("--trainer.precision", "32-true", "--name", "single")
    assert run_here("evaluate", "--checkpoint", run, "--record", "records", *more) == 0
    single = read_record(tmp_path / "records" / "single-1.json").metrics["test_bpc"]
    assert single == pytest.approx(fitted.metrics["test_bpc"], rel=1e-5)
    assert single != fitted.metrics["test_bpc"]


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(run, fitted, capsys):
    assert run_here("evaluate", "--checkpoint", run) == 0
    assert f"{fitted['test_bpc']:.4f}" in capsys.readouterr().out


def test_other_text_is_scored_with_the_vocabulary_of_the_checkpoint(run, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_bytes((ODD[4:9] * 500).encode("utf-8"))
    arguments = ("--checkpoint", run, "--data.source.init_args.path", other)
    assert run_here("evaluate", *arguments) == 0
    assert "250 characters" in capsys.readouterr().out


def test_shorter_windows_and_less_text_may_be_asked_for(run, capsys):
    more = ("--data.length", 8, "--data.max_eval_characters", 100)
    assert run_here("evaluate", "--checkpoint", run, *more) == 0
    assert "100 characters" in capsys.readouterr().out


def test_longer_windows_are_refused(run, capsys):
    assert run_here("evaluate", "--checkpoint", run, "--data.length", 20) == 1
    assert capsys.readouterr().err == (
        "error: 20 dimensions were asked for, and a base is fitted to the levels and dimensions of "
        "its transforms: train a flow without transforms, dflows.flows.language_model say\n"
    )


def test_a_model_over_lanes_is_scored_in_any_passes_and_windows(tmp_path, capsys):
    folder = ("--trainer.logger.init_args.save_dir", tmp_path)
    more = ("--trainer.max_steps", 2, "--data.init_args.max_eval_characters", 200)
    assert run_here("fit", "--config", "smoke/lanes.yaml", *folder, *more) == 0
    run = tmp_path / "lanes" / "version_0"
    fitted = read_record(run / "lanes-0.json").metrics
    record = ("--record", tmp_path / "records")
    arguments = ("--checkpoint", run, *record, "--passes", 4)
    assert run_here("evaluate", *arguments, "--name", "few") == 0
    few = read_record(tmp_path / "records" / "few-0.json").metrics
    assert few["passes"] == 4
    assert few["test_bpc"] == pytest.approx(fitted["passes_bpc"]["4"], rel=1e-6)
    assert run_here("evaluate", *arguments, "--name", "long", "--data.length", 100) == 0
    long = read_record(tmp_path / "records" / "long-0.json").metrics
    assert (long["passes"], long["examples"]) == (4, {"test": 2})
    capsys.readouterr()
    window = ("--passes", 8, "--window", 120, "--length", 120, "--num_samples", 1)
    assert run_here("generate", "--checkpoint", run, *window) == 0
    assert len(capsys.readouterr().out) == 121
    assert run_here("generate", "--checkpoint", run, "--passes", 40) == 1
    assert "40 levels were asked for: give 1 to 32" in capsys.readouterr().err


def test_unknown_symbols_are_named(run, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("#" * 500)
    code = run_here("evaluate", "--checkpoint", run, "--data.source.init_args.path", other)
    assert code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "'#' (U+0023) is not among" in line


def test_data_of_another_vocabulary_are_refused(run, capsys):
    assert run_here("evaluate", "--checkpoint", run, "--data.vocabulary", "bytes") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the data have another vocabulary of 256 classes" in line


def test_so_are_other_symbols_of_the_same_number(run, tmp_path, capsys):
    symbols = sorted(set(ODD))
    other = tmp_path / "other.txt"
    other.write_bytes("".join(chr(0x4E00 + n % len(symbols)) for n in range(500)).encode("utf-8"))
    more = ("--data.source.init_args.path", other, "--data.vocabulary", "corpus")
    assert run_here("evaluate", "--checkpoint", run, *more) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"another vocabulary of {len(symbols)} classes" in line


@pytest.mark.parametrize("command", ["evaluate", "fit"])
def test_no_vocabulary_is_one_readable_line(run, command, capsys):
    arguments = {
        "evaluate": ("--checkpoint", run),
        "fit": ("--config", run.parents[2] / "small.yaml"),
    }
    assert run_here(command, *arguments[command], "--data.init_args.vocabulary", "null") > 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "vocabulary" in line
    assert "Namespace" not in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--name", "a b"), "--name is 'a b': expected at most 100 letters"),
        (("--record", "small.txt/records"), "no record can be written into small.txt/records"),
    ],
)
def test_what_cannot_be_recorded_is_refused_at_once(
    run, more, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.txt").touch()
    assert run_here("evaluate", "--checkpoint", run, *more) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert "bits per character" not in printed.out


@pytest.mark.parametrize("precision", ["32-true " * 10_000, ["32-true"], 33])
def test_a_precision_that_there_is_not_is_refused_in_a_line(run, tmp_path, capsys, precision):
    content = torch.load(run / "last.ckpt", weights_only=True)
    content["dflows"]["config"]["trainer"]["precision"] = precision
    torch.save(content, tmp_path / "crafted.ckpt")
    assert run_here("evaluate", "--checkpoint", tmp_path / "crafted.ckpt") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("so train the model again")
    assert "names a precision of training that there is not" in line


def test_two_processes_count_every_character_once(run, fitted, tmp_path):
    more = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu")
    done = run_apart("evaluate", "--checkpoint", run, *more, "--record", "records", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = read_record(tmp_path / "records" / "small-test-1.json").metrics
    assert metrics["characters"] == {"test": 300}
    assert metrics["test_bpc"] == pytest.approx(fitted["test_bpc"], rel=1e-6)
    assert metrics["residual_bpc"] == fitted["residual_bpc"]
