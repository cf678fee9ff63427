"""``trainer.precision: auto``: kept as it is written, and resolved where a trainer is made."""

import pytest
import yaml

from dflows import precision
from dflows.cli.trainer import Trainer
from dflows.records import read_record
from tests.commands import run_here, small_config, write_text


@pytest.fixture
def fast(monkeypatch):
    """Makes devices of these types the fast ones."""
    return lambda *types: monkeypatch.setattr(precision, "has_bfloat16", types.__contains__)


@pytest.mark.parametrize("given", ["bf16-true", "64-true", 32, None])
def test_others_are_lightnings(given):
    trainer = Trainer(accelerator="cpu", precision=given, logger=False)
    assert trainer.precision == {32: "32-true", None: "32-true"}.get(given, given)


def test_a_run_is_recorded_in_the_precision_that_it_had(fast, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path, write_text(tmp_path), precision="auto")
    assert run_here("fit", "--config", config, "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["precision"] == "auto"
    for types, resolved in ((("cpu",), "bf16-mixed"), (("cuda",), "32-true")):
        fast(*types)
        assert run_here("fit", "--config", config, "--name", resolved, "--record", "records") == 0
        rows = [row for row in capsys.readouterr().out.splitlines() if "precision" in row]
        assert len(rows) == 1
        assert resolved in rows[0]
        record = read_record(tmp_path / "records" / f"{resolved}-1.json")
        assert record.precision == resolved
        assert record.config["trainer"]["precision"] == "auto"
    # Another device evaluates in its own.
    run = tmp_path / "runs" / "bf16-mixed" / "version_0"
    assert run_here("evaluate", "--checkpoint", run, "--record", "records") == 0
    evaluated = read_record(tmp_path / "records" / "bf16-mixed-test-1.json")
    trained = read_record(run / "bf16-mixed-1.json")
    assert (trained.precision, evaluated.precision) == ("bf16-mixed", "32-true")
    assert evaluated.metrics["test_bpc"] == pytest.approx(trained.metrics["test_bpc"], rel=1e-6)


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_a_wrong_one_is_told_all_that_there_are(command, tmp_path, capsys):
    config = small_config(tmp_path, write_text(tmp_path), max_steps=1)
    arguments = ("--config", config)
    if command == "evaluate":
        assert run_here("fit", *arguments) == 0
        arguments = ("--checkpoint", tmp_path / "runs" / "small" / "version_0")
        capsys.readouterr()
    assert run_here(command, *arguments, "--trainer.precision", "bf16-mxed") == 2
    (line,) = capsys.readouterr().err.splitlines()
    for expected in ("trainer.precision", "bf16-mxed", "'auto'", "'bf16-mixed'", "'32-true'"):
        assert expected in line
