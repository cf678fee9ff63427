"""The README's table and figure of text models."""

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
        lengths = " or ".join(map(str, windows))
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
        rows.append(cells)
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
    """Draws test bits per character against passes, as an SVG file.

    Raises:
        UserError: If no record counts passes.
    """
    records = [record for record in records if "passes" in record.metrics]
    if not records:
        raise UserError("no record counts passes, so there is nothing to draw: run a flow")
    most = max(1, *(record.metrics["passes"] for record in records))
    with drawing(file, describe_figure(records), figsize=(7, 3.6)) as (_, axes):
        for record in records:
            passes, bpc = record.metrics["passes"], record.metrics["test_bpc"]
            right = passes > most / 2
            axes.scatter(passes, bpc, s=60, zorder=3)
            axes.annotate(
                f"{record.name}  {bits(record, bpc, '.2f')}",
                (passes, bpc),
                textcoords="offset points",
                xytext=(-9, 5) if right else (0, 9),
                ha="right" if right else "center" if passes else "left",
            )
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
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)


def _heights(records: Sequence[Record]) -> list[float]:
    return [record.metrics["test_bpc"] for record in records]
