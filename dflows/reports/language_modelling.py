"""The table and the figure of the comparison on characters."""

from pathlib import Path

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
    "parameters",
    "trained, s",
    "1 sequence, s",
    "32 sequences, s",
)


def render(experiment: Experiment) -> str:
    """Renders a table for every text, and what the levels of a window cost.

    Args:
        experiment: The plan and the records.

    Returns:
        Markdown.
    """
    return "\n\n".join(
        part
        for task in experiment.plan.tasks
        if [*experiment.rows(task)]
        for part in (_task(experiment, task), _levels(experiment, task))
        if part
    )


def _task(experiment: Experiment, task: str) -> str:
    shown = [(row, experiment.of(name, task)[0]) for name, row in experiment.rows(task)]
    metrics = shown[0][1].metrics
    caption = f"**{task}**"
    if "test" in metrics.get("characters", {}):
        caption += f": {metrics['characters']['test']:,} characters of test"
    if "unigram_bpc" in metrics:
        caption += f", unigram entropy {metrics['unigram_bpc']:.3f} bits"
    lengths = {record.metrics.get("generation_length", 0) for _, record in shown} - {0}
    windows = " or ".join(map(str, sorted(lengths)))
    caption += f". A sequence is a window of {windows} characters." if windows else "."
    budgets = sorted({record.budget for _, record in shown if record.budget})
    caption += f" Budget: {'; '.join(budgets)}." if budgets else ""
    return f"{caption}\n\n{table(HEAD, [_line(task, *each) for each in shown])}"


def _line(task: str, row: Row, record: Record) -> list[str]:
    metrics = record.metrics
    return [
        row.label,
        number(row.published.get(task), ".2f"),
        number(row.published_seconds.get(task), ".3g"),
        bits(record, metrics.get("test_bpc")),
        bits(record, metrics.get("test_bpc_carried")),
        bits(record, metrics.get("test_bpc_importance")),
        number(metrics.get("passes"), "d"),
        number(record.parameters, ",d"),
        number(metrics.get("train_seconds"), ",.0f"),
        number(metrics.get("generation_seconds_1")),
        number(metrics.get("generation_seconds_32")),
    ]


def _levels(experiment: Experiment, task: str) -> str:
    lines = []
    for name, row in experiment.rows(task):
        metrics = experiment.of(name, task)[0].metrics
        if "level_bpc" in metrics:
            costs = " ".join(f"{value:.2f}" for value in metrics["level_bpc"])
            lines.append([f"{row.label}, {number(metrics.get('passes'), 'd')} passes", costs])
    if not lines:
        return ""
    head = ("system", "bits per character of each level, in the order of generation")
    return table(head, lines)


def _points(experiment: Experiment) -> list[tuple[str, Record]]:
    return [
        (name, experiment.of(name, task)[0])
        for task in [*experiment.plan.tasks][:1]
        for name, _ in experiment.rows(task)
    ]


def describe_figure(experiment: Experiment) -> str:
    """Returns what the figure shows, in words."""
    parts = [
        f"{name}: {bits(record, record.metrics.get('test_bpc'))} bits, "
        f"{number(record.metrics.get('passes'), 'd')} passes, "
        f"{number(record.metrics.get('generation_seconds_1'))} s"
        for name, record in _points(experiment)
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
        for number_of, (name, record) in enumerate(_points(experiment)):
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
