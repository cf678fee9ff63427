"""The measurement of training on one process and on two."""

import pytest
import torch
from torch.autograd.profiler import profile, record_function

from dflows.memory import most_held
from dflows.records import read_records
from experiments.reports.scaling import render
from experiments.scaling import PLANNED, SMOKE, SYSTEMS, count_work, main

MEBI = 2**20


def test_what_is_held_counts_from_a_mark_on():
    with profile(profile_memory=True) as profiled:
        kept = torch.zeros(MEBI)
        torch.zeros(8 * MEBI)
        with record_function("here"):
            pass
        torch.zeros(2 * MEBI)
    assert kept.numel() == MEBI
    assert most_held(profiled) == pytest.approx(9 * 4 * MEBI, rel=0.01)
    assert most_held(profiled, "here") == pytest.approx(3 * 4 * MEBI, rel=0.01)


def test_the_work_of_a_batch_grows_with_it():
    small, large = (count_work((*SMOKE, "--data.batch_size", str(size))) for size in (4, 8))
    assert large["parameters"] == small["parameters"]
    assert large["batch_characters"] == 2 * small["batch_characters"] == 2 * 4 * 32
    assert large["batch_bytes"] == pytest.approx(2 * small["batch_bytes"], rel=1e-6)


def test_operations_are_those_of_matrix_products():
    work = count_work(("--config", "text/transformer.yaml", "--data.batch_size", "1"))
    # Two for each weight and character forward, twice as many backward; attention adds to it.
    products = 6 * work["parameters"] * work["batch_characters"]
    assert 0.9 * products < work["batch_operations"] < 1.5 * products


@pytest.mark.slow
@pytest.mark.parametrize("system", [*SYSTEMS.values(), PLANNED])
def test_every_system_can_be_counted(system):
    assert count_work(system)["batch_bytes"] > 0


@pytest.mark.slow
def test_the_command_measures_one_process_and_two(tmp_path):
    assert main(["--smoke", "--steps", "8", "--rounds", "1", "--record", str(tmp_path)]) == 0
    records = {record.name: record for record in read_records(tmp_path)}
    assert set(records) == {"smoke-1", "smoke-2", "planned"}
    for number in (1, 2):
        metrics = records[f"smoke-{number}"].metrics
        weights = 4 * records[f"smoke-{number}"].parameters
        assert metrics["process_bytes"] > 4 * weights
        rate = number * metrics["batch_characters"] / metrics["step_seconds"]
        assert metrics["characters_per_second"] == pytest.approx(rate)
    assert records["smoke-2"].metrics["link_bandwidth"] > 0
    text = render([*records.values()])
    assert "| smoke |" in text
    assert "**Planned, not measured" in text
