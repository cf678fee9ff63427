"""The tables of the benchmarks: every method beside its baseline, measured in one run."""

from collections.abc import Callable, Sequence

from dflows.records import Record
from experiments.reports.markdown import number, table

__all__ = ["render"]


def render(records: Sequence[Record]) -> str:
    """Renders the records of `benchmarks/`.

    Args:
        records: The records.

    Returns:
        Markdown: the tables of every device that has records, or nothing.
    """
    parts = []
    for device in dict.fromkeys(record.device for record in records):
        of_device = [record for record in records if record.device == device]
        for name, rendered in TABLES.items():
            some = [record for record in of_device if record.name.startswith(f"{name}-")]
            if some:
                parts += rendered(device, some)
    return "\n\n".join(parts)


def _times(value: float | None) -> str:
    """Formats a ratio, be it a hundred or a hundredth."""
    return number(value, ",.0f" if value is not None and value >= 1000 else ".3g")


def _generation(device: str, records: Sequence[Record]) -> list[str]:
    def kind(record: Record) -> tuple[str, int]:
        return record.config["size"], record.metrics["generation_length"]

    parts = []
    for size, length in dict.fromkeys(map(kind, records)):
        of_kind = [record for record in records if kind(record) == (size, length)]
        parts += _generation_of("equal parameters" if size == "equal" else f"{size} sizes", of_kind)
    parts[0] = f"**{device}**\n\n{parts[0]}"
    return parts


def _generation_of(size: str, records: Sequence[Record]) -> list[str]:
    first = records[0]
    caption = (
        f"Generation, {size}: {first.metrics['generation_length']} characters of "
        f"{first.config['num_classes']} classes, {first.precision}. The device reads "
        f"{first.metrics['memory_bandwidth'] / 1e9:.1f} GB and does "
        f"{first.metrics['matrix_rate'] / 1e9:.0f} GFLOP a second. The baseline is "
        f"{first.config['opponent_1']} for 1 sequence and {first.config['opponent_32']} for 32, "
        f"and the naive baseline is {first.config['naive_opponent']}."
    )
    every = first.config["naive_every"]
    if every > 1:
        caption += f" Naive: every {every}th character is timed and counted {every} times."
    columns = ("s", "over the roofline", "speed-up", "speed-up over naive")
    head = ["system, method", "parameters", "passes"]
    head += [f"{what}, {some}" for some in ("1 sequence", "32 sequences") for what in columns]
    rows = []
    for record in records:
        metrics = record.metrics
        cells = [
            f"{record.config['system']}, {record.config['way']}",
            f"{record.parameters:,}",
            number(metrics.get("passes"), "d"),
        ]
        for sequences in (1, 32):
            seconds = metrics[f"generation_seconds_{sequences}"]
            roofline = metrics.get(f"roofline_seconds_{sequences}")
            cells += [
                f"{seconds:.4f}",
                _times(seconds / roofline if roofline else None),
                _times(metrics[f"generation_ratio_{sequences}"]),
                _times(metrics[f"naive_ratio_{sequences}"]),
            ]
        rows.append(cells)
    return [caption, table(head, rows)]


def _modular(device: str, records: Sequence[Record]) -> list[str]:
    rows, shape = [], records[0].config["shape"]
    for record in sorted(records, key=lambda record: record.config["num_classes"]):
        metrics = record.metrics
        rows.append(
            [
                f"K = {record.config['num_classes']}, {record.config['way']}",
                f"{record.config['rows']}",
                f"{metrics['call_seconds'] * 1e3:.2f}",
                f"{metrics['call_bytes'] / 1e6:.1f}",
                _times(_inverse(metrics.get("seconds_ratio"))),
                _times(_inverse(metrics.get("bytes_ratio"))),
            ]
        )
    head = ("map", "rows", "ms", "MB", "times the gathers' ms", "times the gathers' MB")
    caption = (
        f"The modular map with its three gradients, for {shape[0]} × {shape[1]} dimensions "
        f"({device}). What would not fit into memory is timed on fewer of the {shape[0]} rows and "
        "scaled up:"
    )
    return [caption, table(head, rows)]


def _step(device: str, records: Sequence[Record]) -> list[str]:
    plain = {record.name: record for record in records}
    rows = []
    for record in records:
        if "opponent" in record.config:
            opponent = plain[record.config["opponent"]]
            rows.append(
                [
                    record.config["network"],
                    f"{record.metrics['call_seconds'] * 1e3:.1f}",
                    f"{opponent.metrics['call_seconds'] * 1e3:.1f}",
                    f"{1 / record.metrics['seconds_ratio']:.2f}",
                ]
            )
    head = ("network, bijection", "flow, ms", "language model, ms", "ratio")
    caption = (
        "A training step of a flow, and of a language model with the same network and ordering "
        f"({device}):"
    )
    return [caption, table(head, rows)]


def _compression(device: str, records: Sequence[Record]) -> list[str]:
    rows = []
    for record in sorted(records, key=lambda record: -record.metrics["passes"]):
        metrics = record.metrics
        cells = [record.config["system"], f"{record.parameters:,}", str(metrics["passes"])]
        for sequences in (1, 32):
            seconds = metrics[f"decode_seconds_{sequences}"]
            characters = sequences * metrics["generation_length"]
            cells += [f"{seconds:.3f}", f"{characters / seconds:,.0f}"]
            cells.append(_times(metrics[f"decode_ratio_{sequences}"]))
        rows.append(cells)
    columns = ("s", "characters/s", "speed-up")
    head = ["system", "parameters", "passes"]
    head += [f"{what}, {some}" for some in ("1 sequence", "32 sequences") for what in columns]
    first = records[0]
    caption = (
        f"Decoding archives of sequences of {first.metrics['generation_length']} characters of "
        f"{first.config['num_classes']} classes, beside the same LSTM from left to right, on one "
        f"thread ({device}):"
    )
    return [caption, table(head, rows)]


def _throughput(device: str, records: Sequence[Record]) -> list[str]:
    rows = [
        [
            record.name.removeprefix("throughput-"),
            f"{record.parameters:,}",
            f"{record.metrics['characters_per_second']:,.0f}",
        ]
        for record in records
    ]
    caption = (
        "Training the quickstart's network with `dflows.fit` (lightning) and with a hand-written "
        f"loop (plain) ({device}):"
    )
    return [caption, table(("loop", "parameters", "characters/s"), rows)]


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value


TABLES: dict[str, Callable[[str, Sequence[Record]], list[str]]] = {
    "compression": _compression,
    "generation": _generation,
    "modular": _modular,
    "step": _step,
    "throughput": _throughput,
}
"""The renderers, by the first part of the records' names."""
