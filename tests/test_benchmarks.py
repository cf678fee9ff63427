"""The benchmarks run, and write records with their opponents."""

import runpy
import sys
from dataclasses import replace

import pytest
import torch

from dflows.records import read_records
from experiments.reports.benchmarks import render
from tests.commands import ROOT


def run(name, folder, *options):
    """Runs a benchmark as its command does, in this process."""
    script, threads = ROOT / "benchmarks" / f"{name}.py", torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(script.parent))
        patch.setattr(sys, "argv", [str(script), *options, "--record", str(folder)])
        runpy.run_path(str(script), run_name="__main__")
    torch.set_num_threads(threads)
    return {record.name: record for record in read_records(folder)}


def test_compression(tmp_path):
    records = run("compression", tmp_path, "--smoke")
    twin = records["compression-lstm-cpu"].metrics
    assert len(records) == 2
    text = render([*records.values()])
    for record in records.values():
        assert record.config["opponent"] == "compression-lstm-cpu"
        for number in (1, 32):
            seconds = record.metrics[f"decode_seconds_{number}"]
            ratio = twin[f"decode_seconds_{number}"] / seconds
            assert record.metrics[f"decode_ratio_{number}"] == pytest.approx(ratio)
            assert f"| {seconds:.3f} | {32 * number / seconds:,.0f} | {ratio:.3g} |" in text


def test_generation(tmp_path):
    records = run("generation", tmp_path, "--smoke")
    systems = {record.config["system"] for record in records.values()}
    assert {"transformer", "lstm", "bipartite-8", "levels-16", "few-pass-16", "n-gram"} <= systems
    assert {"latent-af", "latent-iaf", "coarse-to-fine", "both-directions"} <= systems
    for record in records.values():
        metrics = record.metrics
        assert record.kind == "benchmark"
        assert record.config["opponent_1"] == "transformer steps"
        opponent = records["generation-equal-transformer-steps-cpu"].metrics
        for number in (1, 32):
            seconds = metrics[f"generation_seconds_{number}"]
            assert 0 < seconds <= metrics[f"generation_seconds_{number}_p95"]
            ratio = opponent[f"generation_seconds_{number}"] / seconds
            assert metrics[f"generation_ratio_{number}"] == pytest.approx(ratio)
            if record.config["system"] != "n-gram":
                assert 0 < metrics[f"roofline_seconds_{number}"] < seconds
    naive = records["generation-equal-transformer-naive-cpu"].metrics
    assert naive["naive_ratio_1"] == 1
    text = render([*records.values()])
    assert text.count("**") == 2
    for record in records.values():
        seconds = record.metrics["generation_seconds_32"]
        ratio = record.metrics["generation_ratio_32"]
        (line,) = (
            line
            for line in text.splitlines()
            if line.startswith(f"| {record.config['system']}, {record.config['way']} |")
        )
        assert f"| {seconds:.4f} |" in line
        assert f"| {ratio:.3g} |" in line


def test_generation_over_lanes_has_a_table_of_its_length(tmp_path):
    options = ("--smoke", "--opponent", "transformer-lanes", "--systems")
    run("generation", tmp_path, *options, "lstm-lanes-32")
    systems = ("lstm-lanes", "lstm-lanes-32", "transformer-lanes-64")
    records = run("generation", tmp_path, *options, *systems, "--length", "2048")
    longer = {name for name in records if name.startswith("generation-equal-2048-")}
    assert longer == {
        f"generation-equal-2048-{name}-cpu"
        for name in (
            *("transformer-lanes-naive", "transformer-lanes-steps", "lstm-lanes-naive"),
            *("lstm-lanes-steps", "lstm-lanes-32-steps", "transformer-lanes-64-steps"),
        )
    }
    assert "generation-equal-lstm-lanes-32-steps-cpu" in records
    record = records["generation-equal-2048-lstm-lanes-32-steps-cpu"]
    assert record.config["opponent_1"] == "transformer-lanes steps"
    # A smoke has short sequences whatever is asked for.
    shown = [
        replace(
            record, metrics={**record.metrics, "generation_length": 2048 if name in longer else 16}
        )
        for name, record in records.items()
    ]
    text = render(shown)
    for length in (16, 2048):
        assert text.count(f"\nGeneration, equal parameters: {length} characters of") == 1


def test_generation_begins_no_further_system_when_the_time_is_over(tmp_path):
    records = run("generation", tmp_path, "--smoke", "--systems", "lstm", "--within", "0")
    assert {record.config["system"] for record in records.values()} == {"transformer"}


def test_modular(tmp_path):
    records = run("modular", tmp_path, "--smoke")
    for num_classes in (5, 27):
        ours = records[f"modular-gathers-{num_classes}-cpu"].metrics
        dense = records[f"modular-dense-{num_classes}-cpu"]
        assert dense.config["opponent"] == f"modular-gathers-{num_classes}-cpu"
        ratio = ours["call_bytes"] / dense.metrics["call_bytes"]
        assert dense.metrics["bytes_ratio"] == pytest.approx(ratio)
        assert ratio < 1
    steps = [name for name in records if name.startswith("step-")]
    assert len(steps) == 12
    flow = records["step-transformer-rank-cpu"]
    assert flow.metrics["seconds_ratio"] > 0
    model = records[flow.config["opponent"]]
    text = render([*records.values()])
    assert "| K = 27, gathers | " in text
    row = f"{flow.metrics['call_seconds'] * 1e3:.1f} | {model.metrics['call_seconds'] * 1e3:.1f} |"
    assert f"| transformer-rank | {row} {1 / flow.metrics['seconds_ratio']:.2f} |" in text


@pytest.mark.slow
def test_throughput(tmp_path):
    records = run("throughput", tmp_path, "--steps", "10", "--repeats", "1")
    assert set(records) == {"throughput-lightning", "throughput-plain"}
    text = render([*records.values()])
    for name, record in records.items():
        assert f"| {name.removeprefix('throughput-')} | {record.parameters:,} |" in text
        assert record.metrics["characters_per_second"] > 0
