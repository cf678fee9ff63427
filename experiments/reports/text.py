"""The README's table and figure of text models."""

import math
from collections.abc import Sequence
from pathlib import Path

from dflows.errors import UserError
from dflows.records import Record
from experiments.reports.figures import drawing
from experiments.reports.markdown import MISSING, number, table

__all__ = ["bits", "describe_figure", "draw_figure", "render_table"]

HEAD = (
    "config",
    "passes",
    "valid bpc",
    "test bpc",
    "of unigram",
    "trained, s",
    "characters/s",
    "1 sequence, s",
    "32 sequences, s",
)


def _cell(record: Record, key: str, form: str = ".3f") -> str:
    return number(record.metrics.get(key), form)


def bits(record: Record, value: float | None, form: str = ".3f") -> str:
    """Returns bits per character, marked where they are a bound."""
    cell = number(value, form)
    return f"≤ {cell}" if record.likelihood == "bound" and value is not None else cell


def _of_unigram(record: Record) -> str:
    metrics = record.metrics
    if not metrics.get("unigram_bpc"):
        return MISSING
    return bits(record, metrics["test_bpc"] / metrics["unigram_bpc"])


def _other_passes(record: Record) -> list[list[str]]:
    """Returns the lines of the same network in other numbers of passes."""
    metrics = record.metrics
    seconds = metrics.get("passes_seconds_1", {})
    return [
        [
            f"`{record.name}.yaml`, --passes {passes}",
            passes,
            MISSING,
            f"{bpc:.3f}",
            f"{bpc / metrics['unigram_bpc']:.3f}" if metrics.get("unigram_bpc") else MISSING,
            MISSING,
            MISSING,
            number(seconds.get(passes)),
            MISSING,
        ]
        for passes, bpc in metrics.get("passes_bpc", {}).items()
        if int(passes) != metrics.get("passes")
    ]


def _passes_first(record: Record) -> tuple[int, str]:
    return record.metrics.get("passes", 0), record.name


def _footnote(records: Sequence[Record]) -> str:
    metrics = records[0].metrics
    devices = ", ".join(sorted({record.device for record in records}))
    sentence = "All likelihoods are exact,"
    if any(record.likelihood == "bound" for record in records):
        sentence = "Likelihoods are exact but for the bounds, marked ≤,"
    sentence += f" over all {metrics['characters']['test']:,} characters of the test split"
    if "unigram_bpc" in metrics:
        sentence += f", whose unigram entropy is {metrics['unigram_bpc']:.3f} bits"
        if "bigram_bpc" in metrics:
            sentence += f" and whose bigram entropy is {metrics['bigram_bpc']:.3f}"
    parts = [sentence]
    timed = [record.metrics for record in records if "generation_length" in record.metrics]
    if timed:
        windows = sorted({metrics["generation_length"] for metrics in timed})
        *others, last = map(str, windows)
        lengths = f"{', '.join(others)} or {last}" if others else last
        parts.append(f"A sequence is a window of {lengths} characters; times are medians")
    return ". ".join([*parts, f"Measured on: {devices}."])


def _speed(benchmark: Record) -> float:
    speed: float = benchmark.metrics.get("characters_per_second", 0.0)
    if not speed > 0:
        raise UserError(
            f"the record of {benchmark.name} has no characters_per_second above 0: run "
            "benchmarks/throughput.py again"
        )
    return speed


def render_table(records: Sequence[Record], benchmarks: Sequence[Record] = ()) -> str:
    """Renders records of text runs as a Markdown table.

    Args:
        records: Records of `python -m dflows.fit` on one corpus.
        benchmarks: Records of benchmarks; those of `benchmarks/throughput.py` are shown.

    Returns:
        Markdown, one line a record.

    Raises:
        UserError: If a record lacks test_bpc, its number of test characters, or the speed of a
            benchmark; or the records scored different characters.
    """
    for key, has in (
        ("test_bpc", lambda metrics: "test_bpc" in metrics),
        ("characters of test", lambda metrics: "test" in metrics.get("characters", {})),
    ):
        if lacking := [record.name for record in records if not has(record.metrics)]:
            raise UserError(
                f"the records of {', '.join(lacking)} have no {key}: run them to the end"
            )
    scored = {record.metrics["characters"]["test"] for record in records}
    if len(scored) > 1:
        raise UserError(
            f"the records scored {sorted(scored)} characters of test: they are of different corpora"
        )
    rows: list[list[str]] = []
    for record in sorted(records, key=_passes_first):
        cells = [
            f"`{record.name}.yaml`",
            _cell(record, "passes", "d"),
            bits(record, record.metrics.get("valid_bpc")),
            bits(record, record.metrics.get("test_bpc")),
            _of_unigram(record),
            _cell(record, "train_seconds", ".0f"),
            _cell(record, "characters_per_second", ",.0f"),
            _cell(record, "generation_seconds_1"),
            _cell(record, "generation_seconds_32"),
        ]
        rows += [*_other_passes(record), cells]
    lines = [table(HEAD, rows)]
    if records:
        lines += ["", _footnote(records)]
    throughput = [record for record in benchmarks if record.name.startswith("throughput-")]
    speeds = {record.name: _speed(record) for record in throughput}
    if {"throughput-lightning", "throughput-plain"} <= speeds.keys():
        ratio = speeds["throughput-plain"] / speeds["throughput-lightning"]
        note = (
            f"A hand-written loop trains the quickstart's network {ratio:.2f} times as fast as "
            "`dflows.fit`, in one run of `benchmarks/throughput.py`."
        )
        lines += ["", note]
    return "\n".join(lines)


def describe_figure(records: Sequence[Record]) -> str:
    """Returns what the figure shows, in words."""
    shown = (
        f"{record.name}: {record.metrics['passes']} passes, "
        f"{bits(record, record.metrics['test_bpc'])} bits"
        for record in sorted(records, key=_passes_first)
        if "passes" in record.metrics
    )
    return "; ".join(shown)


def draw_figure(records: Sequence[Record], file: Path) -> None:
    """Draws test bits per character against passes and against seconds, as an SVG file.

    Seconds are those of 1,000 characters of one sequence, since sequences differ in length. A line
    joins the numbers of passes of one network.

    Raises:
        UserError: If no record counts passes.
    """
    records = [record for record in records if "passes" in record.metrics]
    if not records:
        raise UserError("no record counts passes, so there is nothing to draw: run a flow")
    most = max(1, *(record.metrics["passes"] for record in records))
    look = {"ncols": 2, "figsize": (10, 3.8), "sharey": True}
    with drawing(file, describe_figure(records), **look) as (_, (axes, timed)):
        for index, record in enumerate(records):
            color = f"C{index}"
            named = f"{record.name}  {bits(record, record.metrics['test_bpc'], '.2f')}"
            for place, points, label in (
                (axes, _by_passes(record), named),
                (timed, _by_seconds(record), record.name),
            ):
                place.plot(*zip(*points, strict=True), color=color, marker="o", zorder=3)
                place.annotate(
                    label,
                    points[0],
                    textcoords="offset points",
                    xytext=(0, 9),
                    ha="left" if place is axes and not points[0][0] else "center",
                    fontsize=8,
                    color=color,
                )
        timed.set_xscale("log")
        timed.set_xlabel("seconds to generate 1,000 characters of one sequence")
        metrics = records[0].metrics
        for key, label in (("unigram_bpc", "unigram"), ("bigram_bpc", "bigram")):
            if key not in metrics:
                continue
            axes.axhline(metrics[key], linestyle="--", linewidth=1, color="grey")
            axes.annotate(
                f"{label} entropy  {metrics[key]:.2f}",
                (most, metrics[key]),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                color="grey",
            )
        # Linear up to 1, for a base without a network takes no pass.
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlim(-0.1, 1.2 * most)
        axes.set_ylim(0, 1.15 * max(metrics.get("unigram_bpc", 0), *_heights(records)))
        axes.set_xlabel("passes: sequential network evaluations to generate a batch")
        bounds = any(record.likelihood == "bound" for record in records)
        axes.set_ylabel(f"{'' if bounds else 'exact '}bits per character, test")
        for place in (axes, timed):
            for side in ("top", "right"):
                place.spines[side].set_visible(False)


def _by_passes(record: Record) -> list[tuple[float, float]]:
    """Returns passes and bits, of every number of passes of the network."""
    metrics = record.metrics
    found = {int(passes): bpc for passes, bpc in metrics.get("passes_bpc", {}).items()}
    return sorted({metrics["passes"]: metrics["test_bpc"], **found}.items())


def _by_seconds(record: Record) -> list[tuple[float, float]]:
    """Returns seconds of 1,000 characters and bits, where they were measured."""
    metrics = record.metrics
    length = metrics.get("generation_length", math.nan)
    seconds = {
        int(passes): value for passes, value in metrics.get("passes_seconds_1", {}).items()
    } or {metrics["passes"]: metrics.get("generation_seconds_1", math.nan)}
    bits_of = dict(_by_passes(record))
    return [(1000 * value / length, bits_of[passes]) for passes, value in sorted(seconds.items())]


def _heights(records: Sequence[Record]) -> list[float]:
    return [record.metrics["test_bpc"] for record in records]
