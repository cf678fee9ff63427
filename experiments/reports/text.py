"""The README's table of text models."""

from collections.abc import Sequence

from dflows.errors import UserError
from dflows.records import Record
from experiments.reports.curves import bits
from experiments.reports.markdown import MISSING, number, table

__all__ = ["render_table"]

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
