"""Makes the README's table and figure from records: ``python -m dflows.report``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dflows.cli.errors import run_command
from dflows.errors import UserError
from dflows.files import replacing
from dflows.records import Record, read_records

__all__ = ["describe_figure", "draw_figure", "main", "render_table", "report", "update_readme"]

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def _cell(record: Record, key: str, form: str = ".3f") -> str:
    """Returns a metric as the table shows it: not every kind of model has all of them."""
    value = record.metrics.get(key)
    return "–" if value is None else format(value, form)


def _of_unigram(record: Record) -> str:
    metrics = record.metrics
    return (
        f"{metrics['test_bpc'] / metrics['unigram_bpc']:.3f}" if "unigram_bpc" in metrics else "–"
    )


def _passes_first(record: Record) -> tuple[int, str]:
    return record.metrics.get("passes", 0), record.name


def _footnote(records: Sequence[Record]) -> str:
    metrics = records[0].metrics
    devices = ", ".join(sorted({record.device for record in records}))
    sentence = (
        f"All likelihoods are exact, over all {metrics['characters']['test']:,} characters of the "
        "test split"
    )
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


def render_table(records: Sequence[Record], benchmarks: Sequence[Record] = ()) -> str:
    """Renders records of text runs as a Markdown table.

    Args:
        records: Records of `python -m dflows.fit` on one corpus.
        benchmarks: Records of `benchmarks/throughput.py`.

    Returns:
        Markdown, with a line for every record.

    Raises:
        UserError: If a record has no test_bpc, or the records scored different characters.
    """
    lacking = [record.name for record in records if "test_bpc" not in record.metrics]
    if lacking:
        raise UserError(
            f"the records of {', '.join(lacking)} have no test_bpc: run them to the end"
        )
    scored = {record.metrics["characters"]["test"] for record in records}
    if len(scored) > 1:
        raise UserError(
            f"the records scored {sorted(scored)} characters of test: they are of different corpora"
        )
    head = (
        "| config | passes | valid bpc | test bpc | of unigram | trained, s | characters/s "
        "| 1 sequence, s | 32 sequences, s |"
    )
    lines = [head, "| --- |" + " ---: |" * 8]
    for record in sorted(records, key=_passes_first):
        cells = (
            f"`{record.name}.yaml`",
            _cell(record, "passes", "d"),
            _cell(record, "valid_bpc"),
            _cell(record, "test_bpc"),
            _of_unigram(record),
            _cell(record, "train_seconds", ".0f"),
            _cell(record, "characters_per_second", ",.0f"),
            _cell(record, "generation_seconds_1"),
            _cell(record, "generation_seconds_32"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    if records:
        lines += ["", _footnote(records)]
    speeds = {record.name: record.metrics["characters_per_second"] for record in benchmarks}
    if {"throughput-lightning", "throughput-plain"} <= speeds.keys():
        ratio = speeds["throughput-plain"] / speeds["throughput-lightning"]
        note = (
            f"A hand-written loop trains the quickstart's network {ratio:.2f} times as fast as "
            "`dflows.fit`, in one run of `benchmarks/throughput.py`."
        )
        lines += ["", note]
    return "\n".join(lines)


def update_readme(text: str, table: str) -> str:
    """Puts a table between the marks of a README.

    Raises:
        UserError: If the marks are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the README has no lines {BEGIN} and {END}: add them where the table goes")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def describe_figure(records: Sequence[Record]) -> str:
    """Returns what the figure shows, in words: its own description, for those who cannot see it."""
    shown = (
        f"{record.name}: {record.metrics['passes']} passes, {record.metrics['test_bpc']:.3f} bits"
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
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "dflows"
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    most = max(1, *(record.metrics["passes"] for record in records))
    for record in records:
        passes, bpc = record.metrics["passes"], record.metrics["test_bpc"]
        right = passes > most / 2
        axes.scatter(passes, bpc, s=60, zorder=3)
        axes.annotate(
            f"{record.name}  {bpc:.2f}",
            (passes, bpc),
            textcoords="offset points",
            xytext=(-9, 5) if right else (0, 9),
            ha="right" if right else "center",
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
    # Linear up to 1: a base without a network takes no pass at all.
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlim(-0.1, 1.2 * most)
    axes.set_ylim(0, 1.15 * max(metrics.get("unigram_bpc", 0), *_bits(records)))
    axes.set_xlabel("passes: sequential network evaluations to generate a batch")
    axes.set_ylabel("exact bits per character, test")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    described = {"Date": None, "Description": describe_figure(records)}
    try:
        with replacing(file) as unfinished:
            figure.savefig(unfinished, format="svg", metadata=described)
    finally:
        plt.close(figure)


def _bits(records: Sequence[Record]) -> list[float]:
    return [record.metrics["test_bpc"] for record in records]


def report(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments.

    Raises:
        UserError: If records, README or its marks are missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dflows.report",
        description="Make the README's table and figure from the records of finished runs.",
        exit_on_error=False,
    )
    parser.add_argument("--results", type=Path, default=Path("results/text"))
    parser.add_argument("--benchmarks", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/text.svg"))
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise argparse.ArgumentError(None, f"unrecognized arguments: {' '.join(unknown)}")
    count = _report(options.results, options.benchmarks, options.readme, options.figure)
    print(f"{options.readme} and {options.figure} are made from {count} records")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: report(sys.argv[1:] if arguments is None else arguments))


def _report(results: Path, benchmarks: Path, readme: Path, figure: Path) -> int:
    """Makes table and figure, and returns the number of records that went in."""
    records = read_records(results)
    if not records:
        raise UserError(f"{results} holds no records: run python -m dflows.fit first")
    if not readme.is_file():
        raise UserError(f"{readme} is missing: run this in the project's folder")
    speeds = read_records(benchmarks) if benchmarks.is_dir() else []
    old = readme.read_text(encoding="utf-8")
    new = update_readme(old, render_table(records, speeds))
    draw_figure(records, figure)
    with replacing(readme) as unfinished:
        unfinished.write_text(new, encoding="utf-8")
    return len(records)


if __name__ == "__main__":
    sys.exit(main())
