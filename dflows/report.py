"""Makes the README's table and figure from records: ``python -m dflows.report``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dflows.errors import UserError
from dflows.files import replacing
from dflows.records import Record, read_records

__all__ = ["main", "render_table", "update_readme"]

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _passes_first(record: Record) -> tuple[int, str]:
    return record.metrics.get("passes", 0), record.name


def _footnote(records: Sequence[Record]) -> str:
    metrics = records[0].metrics
    devices = ", ".join(sorted({record.device for record in records}))
    windows = sorted({record.metrics["generation_length"] for record in records})
    lengths = " or ".join(map(str, windows))
    return (
        f"All likelihoods are exact, over all {metrics['characters']['test']:,} characters of the "
        f"test split, whose unigram entropy is {metrics['unigram_bpc']:.3f} bits and whose bigram "
        f"entropy is {metrics['bigram_bpc']:.3f}. A sequence is a window of {lengths} characters; "
        f"times are medians. Measured on: {devices}."
    )


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
        metrics = record.metrics
        lines.append(
            f"| `{record.name}.yaml` | {metrics['passes']} | {metrics['valid_bpc']:.3f} "
            f"| {metrics['test_bpc']:.3f} | {metrics['test_bpc'] / metrics['unigram_bpc']:.3f} "
            f"| {metrics['train_seconds']:.0f} | {metrics['characters_per_second']:,.0f} "
            f"| {_seconds(metrics.get('generation_seconds_1'))} "
            f"| {_seconds(metrics.get('generation_seconds_32'))} |"
        )
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


def draw_figure(records: Sequence[Record], file: Path) -> None:
    """Draws test bits per character against passes, as an SVG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "dflows"
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    most = max(record.metrics["passes"] for record in records)
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
    for key, label in (("unigram_bpc", "unigram"), ("bigram_bpc", "bigram")):
        value = records[0].metrics[key]
        axes.axhline(value, linestyle="--", linewidth=1, color="grey")
        axes.annotate(
            f"{label} entropy  {value:.2f}",
            (most, value),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color="grey",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlim(0.9, 1.2 * most)
    axes.set_ylim(0, 1.15 * records[0].metrics["unigram_bpc"])
    axes.set_xlabel("passes: sequential network evaluations to generate a batch")
    axes.set_ylabel("exact bits per character, test")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(file) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None})
    finally:
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: The command line; that of the process by default.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dflows.report",
        description="Make the README's table and figure from the records of finished runs.",
    )
    parser.add_argument("--results", type=Path, default=Path("results/text"))
    parser.add_argument("--benchmarks", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/text.svg"))
    options = parser.parse_args(arguments)
    try:
        count = _report(options.results, options.benchmarks, options.readme, options.figure)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.readme} and {options.figure} are made from {count} records")
    return 0


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
