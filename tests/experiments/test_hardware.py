"""``python -m experiments.hardware``: all steps run in their smoke form, and none stops another."""

import re
import time
from contextlib import ExitStack

import torch

from dflows.records import read_records
from experiments import hardware
from experiments.hardware import ROWS, TASK, TIMINGS, Step, main, run_step, steps
from tests.commands import ROOT

NAMES = ["tests", *TIMINGS, *(f"training {row}" for row in ROWS)]


def listed(folder, **options):
    with ExitStack() as stack:
        return list(steps(stack, folder, **options))


def test_a_smoke_runs_every_step_and_leaves_records(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["--smoke"]) == 0
    printed = capfd.readouterr().out
    for name in NAMES:
        assert f" {name} ─" in printed
        assert re.search(rf"│ {name} +│ +\d+ +│ +\d+ +│ passed", printed)
    assert " passed, " in printed
    assert "skipped" in printed or torch.cuda.is_available()
    results = tmp_path / "results"
    systems = {record.config["system"] for record in read_records(results / "benchmarks-smoke")}
    assert {"lstm-lanes", "lstm-lanes-32", "transformer", "lstm"} == systems
    lanes, twin = sorted(
        read_records(results / "language-modelling-gpu-smoke"), key=lambda record: record.name
    )
    assert (lanes.name, twin.name) == tuple(f"{row}-{TASK}" for row in ROWS)
    assert set(lanes.metrics["passes_bpc"]) == {"8", "64"}
    assert twin.metrics["passes"] == 64
    assert "GPU, 5 minutes" in lanes.budget


def test_what_is_asked_fits_into_fifteen_minutes(tmp_path, monkeypatch):
    found = listed(tmp_path)
    assert [step.name for step in found] == NAMES
    assert sum(step.seconds for step in found) <= 15 * 60 - 20
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from generation import SYSTEMS

    for timing in TIMINGS.values():
        assert set(timing.systems) <= set(SYSTEMS)
    for step in found[1:]:
        assert str(tmp_path) in step.arguments[step.arguments.index("--record") + 1]
    for step in listed(tmp_path, overlay="mine.yaml")[-2:]:
        assert step.arguments[-2:] == ("--config", "mine.yaml")


def test_without_a_gpu_one_line_says_so(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: there is no GPU that PyTorch finds: ")
    assert "--smoke" in line


def test_a_step_that_fails_stops_no_other(monkeypatch, capfd):
    fails = Step("one", 60, ("-c", "raise SystemExit(3)"))
    waits = Step("two", 1, ("-c", "import time; time.sleep(60)"))
    works = Step("three", 60, ("-c", "print('worked')"))
    assert [run_step(step) for step in (fails, waits)] == ["exit code 3", "over its 1 seconds"]
    monkeypatch.setattr(hardware, "steps", lambda *_, **__: [fails, waits, works])
    assert main(["--smoke"]) == 1
    printed = capfd.readouterr()
    assert "worked" in printed.out
    assert "exit code 3" in printed.out
    assert "over its 1 seconds" in printed.out
    assert "error: one, two failed" in printed.err


def test_a_step_ends_with_the_processes_that_it_started(tmp_path):
    file = tmp_path / "late"
    child = f"import pathlib, time; time.sleep(4); pathlib.Path({str(file)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_step(Step("parent", 2, ("-c", parent))) == "over its 2 seconds"
    time.sleep(4)
    assert not file.exists()
