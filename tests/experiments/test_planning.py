"""The formula for several devices, against what was measured here."""

import pytest

from dflows.records import read_records
from experiments.planning import Cost
from experiments.reports.scaling import cost_of
from tests.commands import ROOT

RECORDS = {record.name: record for record in read_records(ROOT / "results" / "scaling")}
PAIRS = [
    pytest.param(RECORDS[f"{system}-1"], RECORDS[f"{system}-2"], id=system)
    for system in dict.fromkeys(record.config["system"] for record in RECORDS.values())
    if f"{system}-2" in RECORDS
]


def test_there_are_records():
    assert len(PAIRS) >= 2


@pytest.mark.parametrize(("alone", "two"), PAIRS)
def test_the_planned_rate_is_that_of_two_processes(alone, two):
    planned = cost_of(alone).rate(2, "ddp", two.metrics["link_bandwidth"])
    assert two.metrics["characters_per_second"] == pytest.approx(planned, rel=0.2)


@pytest.mark.parametrize(("alone", "two"), PAIRS)
def test_the_planned_memory_is_that_of_a_process(alone, two):
    cost = cost_of(alone)
    assert alone.metrics["process_bytes"] == pytest.approx(cost.bytes(1, "auto"), rel=0.2)
    assert two.metrics["process_bytes"] == pytest.approx(cost.bytes(2, "ddp"), rel=0.2)


def test_two_processes_train_nearly_twice_as_fast():
    # The smaller system has steps of a seventh of a second, of which the processes wait for a part.
    alone, two = (RECORDS[f"transformer-{n}"].metrics["characters_per_second"] for n in (1, 2))
    assert two >= 2 * 0.85 * alone


@pytest.mark.parametrize(("strategy", "sent"), [("auto", 0), ("ddp", 2), ("fsdp", 2)])
def test_gradients_travel_as_often_as_the_strategy_has_it(strategy, sent):
    cost = Cost(parameters=250, step_seconds=1.0, batch_bytes=7, dimensions=64)
    assert cost.seconds(4, strategy, link=1000.0) == pytest.approx(1 + sent * 0.75)
    assert cost.seconds(1, strategy, link=1000.0) == 1
    assert cost.rate(4, strategy, link=1e30) == pytest.approx(4 * 64)


def test_what_a_device_holds():
    cost = Cost(parameters=250, step_seconds=1.0, batch_bytes=7, dimensions=64)
    assert cost.bytes(1, "auto") == 4007
    assert cost.bytes(8, "ddp") == 5007
    assert cost.bytes(8, "fsdp") == 2507
