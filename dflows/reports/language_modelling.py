"""The table and the figure of the comparison on characters."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dflows.errors import UserError
from dflows.experiments.plan import Row
from dflows.records import Record
from dflows.reports.experiment import Experiment
from dflows.reports.figures import drawing
from dflows.reports.markdown import number, table
from dflows.reports.text import bits

__all__ = ["describe_figure", "draw", "render"]

HEAD = (
    "system",
    "published bpc",
    "published, s",
    "test bpc, windows",
    "test bpc, carried",
    "importance-weighted",
    "passes",
    "fixed point, iterations",
    "parameters",
    "trained, s",
    "1 sequence, s",
    "32 sequences, s",
)
SIGNS = {"\n": "↵", "\r": "␍"}


class Shown(NamedTuple):
    """A row by its name, and the record that stands for it."""

    name: str
    row: Row
    record: Record


def render(experiment: Experiment) -> str:
    """Renders a table for every text, what the levels of a window cost, and samples.

    Args:
        experiment: The plan and the records.

    Returns:
        Markdown.

    Raises:
        UserError: If records of one text scored different characters.
    """
    parts = []
    for task in experiment.plan.tasks:
        if shown := _shown(experiment, task):
            experiment.first(task, "unigram_bpc")
            parts += [_task(task, shown), *_levels(shown), *_samples(shown)]
    return "\n\n".join(parts)


def _shown(experiment: Experiment, task: str) -> list[Shown]:
    """Returns the rows that a task has records of, with the first of each."""
    return [Shown(name, row, experiment.of(name, task)[0]) for name, row in experiment.rows(task)]


def _task(task: str, shown: Sequence[Shown]) -> str:
    metrics = shown[0].record.metrics
    scored = {
        one.record.metrics["characters"]["test"]
        for one in shown
        if "test" in one.record.metrics.get("characters", {})
    }
    if len(scored) > 1:
        raise UserError(
            f"records of {task} scored {sorted(scored)} characters of test: run them with the same "
            "--overlay, or add --again"
        )
    caption = f"**{task}**"
    if "test" in metrics.get("characters", {}):
        caption += f": {metrics['characters']['test']:,} characters of test"
    if "unigram_bpc" in metrics:
        caption += f", unigram entropy {metrics['unigram_bpc']:.3f} bits"
    lengths = {one.record.metrics.get("generation_length", 0) for one in shown} - {0}
    windows = " or ".join(map(str, sorted(lengths)))
    caption += f". A sequence is a window of {windows} characters." if windows else "."
    budgets = sorted({one.record.budget for one in shown if one.record.budget})
    caption += f" Budget: {'; '.join(budgets)}." if budgets else ""
    return f"{caption}\n\n{table(HEAD, [_line(task, one) for one in shown])}"


def _line(task: str, shown: Shown) -> list[str]:
    _, row, record = shown
    metrics = record.metrics
    return [
        row.label,
        number(row.published.get(task), ".2f"),
        number(row.published_seconds.get(task), ".3g"),
        bits(record, metrics.get("test_bpc")),
        bits(record, metrics.get("test_bpc_carried")),
        bits(record, metrics.get("test_bpc_importance")),
        number(metrics.get("passes"), "d"),
        number(metrics.get("fixed_point_iterations"), ".4g"),
        number(record.parameters, ",d"),
        number(metrics.get("train_seconds"), ",.0f"),
        number(metrics.get("generation_seconds_1")),
        number(metrics.get("generation_seconds_32")),
    ]


def _name(row: Row, record: Record) -> str:
    """Returns what a row is called where its passes are not shown beside it."""
    return f"{row.label}, {number(record.metrics.get('passes'), 'd')} passes"


def _levels(shown: Sequence[Shown]) -> list[str]:
    """Returns a table of what the levels of a window cost, if any record tells."""
    lines = []
    for _, row, record in shown:
        metrics = record.metrics
        if "level_bpc" in metrics:
            costs = " ".join(f"{value:.2f}" for value in metrics["level_bpc"])
            lines.append([_name(row, record), costs])
    head = ("system", "bits per character of each level, in the order of generation")
    return [table(head, lines)] if lines else []


def _samples(shown: Sequence[Shown]) -> list[str]:
    """Returns the first sample of every row, if any record has one.

    A line break within a sample is shown by a sign, so that no sample can end the block.
    """
    lines = []
    for _, row, record in shown:
        if samples := record.metrics.get("samples"):
            text = "".join(SIGNS.get(sign, sign) for sign in samples[0])
            broken = [text[start : start + 88] for start in range(0, len(text), 88)]
            lines += [_name(row, record), *(f"    {part}" for part in broken)]
    if not lines:
        return []
    caption = "The first window that each generated, ↵ a line break:"
    return [caption, "\n".join(["```text", *lines, "```"])]


def _points(experiment: Experiment) -> list[Shown]:
    """Returns what the figure shows: the first text."""
    return _shown(experiment, next(iter(experiment.plan.tasks)))


def describe_figure(experiment: Experiment) -> str:
    """Returns what the figure shows, in words."""
    parts = [
        f"{name}: {bits(record, record.metrics.get('test_bpc'))} bits, "
        f"{number(record.metrics.get('passes'), 'd')} passes, "
        f"{number(record.metrics.get('generation_seconds_1'))} s"
        for name, _, record in _points(experiment)
    ]
    return "Bits per character against passes, and against seconds. " + "; ".join(parts)


def draw(experiment: Experiment, file: Path) -> None:
    """Draws bits per character against passes and against the seconds of one sequence.

    Args:
        experiment: The plan and the records.
        file: The SVG file.
    """
    words = describe_figure(experiment)
    with drawing(file, words, ncols=2, figsize=(11, 4.6), sharey=True) as (_, axes):
        for number_of, (name, _, record) in enumerate(_points(experiment)):
            height = record.metrics.get("test_bpc")
            if height is None:
                continue
            bound = record.likelihood == "bound"
            look = {"marker": "v" if bound else "o", "color": f"C{number_of % 10}", "s": 40}
            for place, key in zip(axes, ("passes", "generation_seconds_1"), strict=True):
                if key in record.metrics:
                    place.scatter(record.metrics[key], height, **look)
                    place.annotate(
                        name,
                        (record.metrics[key], height),
                        textcoords="offset points",
                        xytext=(5, 3),
                        fontsize=7,
                    )
        axes[0].set_xscale("symlog", base=2, linthresh=1)
        axes[0].xaxis.set_major_formatter("{x:.0f}")
        axes[0].set_xlabel("passes: sequential network evaluations of one batch")
        axes[0].set_ylabel("bits per character, test (triangles: bounds)")
        axes[1].set_xscale("log")
        axes[1].set_xlabel("seconds to generate one sequence")
