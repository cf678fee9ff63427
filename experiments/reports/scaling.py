"""Tables of training on several devices: what was measured, and what the formula plans."""

from collections.abc import Sequence
from typing import NamedTuple

from dflows.records import Record
from experiments.planning import Cost, Strategy
from experiments.reports.markdown import MISSING, table

__all__ = ["DEVICE", "Machine", "cost_of", "render"]


class Machine(NamedTuple):
    """Published figures of a kind of GPU, and the share of its rate that is assumed."""

    name: str
    operations: float
    share: float
    memory: float
    link: float
    network: float


DEVICE = Machine(
    name="H100 SXM",
    operations=989e12,  # bfloat16, dense
    share=0.3,
    memory=80e9,
    link=450e9,  # NVLink, each way
    network=50e9,  # one 400 Gb/s adapter a GPU
)
"""The GPU that is planned for. None was at hand: its figures are its maker's."""

CLUSTERS = ((1, 1), (8, 1), (16, 2), (32, 4))
"""GPUs and nodes that are planned."""

SIZES = (100_000_000, 1_000_000_000, 7_000_000_000)
"""Parameters of models whose weights are planned."""


def _strategies(devices: int) -> tuple[Strategy, ...]:
    return ("auto",) if devices == 1 else ("ddp", "fsdp")


def cost_of(record: Record, seconds: float | None = None) -> Cost:
    """Returns what a training step costs one device.

    Args:
        record: A record of `python -m experiments.scaling`.
        seconds: Those of a step; what the record measured, where they are not given.
    """
    metrics = record.metrics
    return Cost(
        parameters=record.parameters,
        step_seconds=metrics["step_seconds"] if seconds is None else seconds,
        batch_bytes=metrics["batch_bytes"],
        dimensions=metrics["batch_characters"],
    )


def render(records: Sequence[Record]) -> str:
    """Renders the records of `python -m experiments.scaling`.

    Args:
        records: The records.

    Returns:
        Markdown: what two processes did, beside the formula; and the plan for GPUs.
    """
    named = {record.name: record for record in records}
    pairs = [
        (named[f"{record.config['system']}-1"], record)
        for record in records
        if record.config["processes"] > 1
    ]
    return "\n\n".join([_measured(pairs), _planned(named["planned"]), _weights()])


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.2f}" if number < 1e10 else f"{number / 1e9:,.0f}"


def _measured(pairs: Sequence[tuple[Record, Record]]) -> str:
    head = (
        *("system", "parameters", "processes", "characters a second", "planned"),
        *("of that many alone", "GB a process", "planned"),
    )
    rows = []
    for alone, two in pairs:
        cost = cost_of(alone)
        for record in (alone, two):
            number = record.config["processes"]
            strategy: Strategy = "ddp" if number > 1 else "auto"
            rate, link = record.metrics["characters_per_second"], two.metrics["link_bandwidth"]
            planned = f"{cost.rate(number, strategy, link):,.0f}" if number > 1 else MISSING
            efficiency = rate / number / alone.metrics["characters_per_second"]
            row = (
                *(record.config["system"], f"{record.parameters:,}", str(number)),
                *(f"{rate:,.0f}", planned, f"{efficiency:.0%}" if number > 1 else MISSING),
                _gigabytes(record.metrics["process_bytes"]),
                _gigabytes(cost.bytes(number, strategy)),
            )
            rows.append(row)
    devices = ", ".join(dict.fromkeys(one.device for _, one in pairs))
    return f"**Measured: {devices}**\n\n{table(head, rows)}"


def _planned(record: Record) -> str:
    seconds = record.metrics["batch_operations"] / (DEVICE.operations * DEVICE.share)
    cost = cost_of(record, seconds)
    head = ("GPUs", "nodes", "strategy", "characters a second", "of that many alone", "GB a GPU")
    rows = []
    for devices, nodes in CLUSTERS:
        link = DEVICE.link if nodes == 1 else DEVICE.network
        for strategy in _strategies(devices):
            rate = cost.rate(devices, strategy, link)
            alone = devices * cost.rate(1, "auto", link)
            row = (
                *(str(devices), str(nodes), strategy, f"{rate:,.0f}"),
                *(f"{rate / alone:.0%}", _gigabytes(cost.bytes(devices, strategy))),
            )
            rows.append(row)
    said = (
        f"**Planned, not measured: {DEVICE.name}**\n\n`lanes-transformer.yaml`: "
        f"{record.parameters:,} parameters, "
        f"{record.metrics['batch_operations'] / record.metrics['batch_characters'] / 1e6:,.0f} "
        f"million operations a character, {record.metrics['batch_characters']:,} characters a "
        f"GPU and step. Published: {DEVICE.operations / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{DEVICE.memory / 1e9:.0f} GB, {DEVICE.link / 1e9:.0f} GB/s each way between the GPUs of "
        f"a node, {DEVICE.network / 1e9:.0f} GB/s from node to node. Assumed: {DEVICE.share:.0%} "
        "of the rate."
    )
    return f"{said}\n\n{table(head, rows)}"


def _weights() -> str:
    ways = [(devices, strategy) for devices in (1, 8, 32) for strategy in _strategies(devices)]
    head = ("parameters", *(f"{way}, {n} GPU{'s' if n > 1 else ''}" for n, way in ways))
    rows = [
        (f"{number:,}", *(_gigabytes(Cost(number, 0.0, 0, 0).bytes(*way)) for way in ways))
        for number in SIZES
    ]
    have = f"{DEVICE.memory / 1e9:.0f}"
    said = f"**Planned: GB a GPU for weights, gradients and moments, of {have} that it has**"
    return f"{said}\n\n{table(head, rows)}"
