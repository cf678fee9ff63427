"""The figure of the comparison on characters: bits against passes, seconds and columns."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dflows.records import Record
from experiments.plan import Published, Row
from experiments.reports.experiment import Experiment
from experiments.reports.figures import drawing
from experiments.reports.markdown import number

__all__ = ["bits", "describe_figure", "draw", "seconds_of_1000"]

PUBLISHED = {"color": "grey", "marker": "*", "s": 70, "facecolors": "none", "zorder": 3}
"""How published points are drawn."""

TICKS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
"""Bits that are marked on the axis."""


def bits(record: Record, value: float | None, form: str = ".3f") -> str:
    """Returns bits per character, marked where they are a bound."""
    cell = number(value, form)
    return f"≤ {cell}" if record.likelihood == "bound" and value is not None else cell


def bits_of(record: Record) -> dict[int, float]:
    """Returns the test bits in every number of passes of a network, the fewest passes first."""
    metrics = record.metrics
    found = {int(passes): bpc for passes, bpc in metrics.get("passes_bpc", {}).items()}
    if "passes" in metrics:
        found[metrics["passes"]] = metrics["test_bpc"]
    return dict(sorted(found.items()))


def seconds_of_1000(record: Record) -> dict[int, float]:
    """Returns the seconds of 1,000 characters of one sequence, in every number of passes.

    They are those of the window that was timed, which differs in length between systems.
    """
    metrics = record.metrics
    if "passes" not in metrics or not metrics.get("generation_length"):
        return {}
    timed = {int(passes): value for passes, value in metrics.get("passes_seconds_1", {}).items()}
    if not timed and "generation_seconds_1" in metrics:
        timed = {metrics["passes"]: metrics["generation_seconds_1"]}
    scale = 1000 / metrics["generation_length"]
    return {passes: scale * seconds for passes, seconds in sorted(timed.items())}


def _drawn(experiment: Experiment) -> tuple[list[tuple[Row, Record]], list[Published]]:
    """Returns the rows of the figure with their first records, and the published points.

    They are those of the first task with records.
    """
    plan = experiment.plan
    names = plan.figure or list(plan.rows)
    for task in plan.tasks:
        rows = [
            (row, record)
            for name, row in experiment.rows(task)
            if name in names and "test_bpc" in (record := experiment.of(name, task)[0]).metrics
        ]
        if rows:
            return rows, plan.published.get(task, [])
    return [], []


def describe_figure(experiment: Experiment) -> str:
    """Returns what the figure shows, in words."""
    rows, published = _drawn(experiment)
    parts = []
    for row, record in rows:
        timed = seconds_of_1000(record)
        points = [
            f"{bits(record, bpc)} in {passes} passes and {number(timed.get(passes))} s"
            for passes, bpc in bits_of(record).items()
        ] or [bits(record, record.metrics["test_bpc"])]
        parts.append(f"{row.label}: {', '.join(points)}")
    parts += [
        f"published, unreproduced: {point.label}, {number(point.bpc, '.2f')} in "
        f"{number(point.passes, 'd')} passes and {number(point.seconds, '.3g')} s"
        for point in published
    ]
    return "Bits per character against passes, and against seconds. " + "; ".join(parts)


def draw(experiment: Experiment, file: Path) -> None:
    """Draws bits per character against passes, seconds of generation, and columns.

    A line joins the numbers of passes of one network, each a choice at generation.

    Args:
        experiment: The plan, whose `figure` names the rows that are drawn, and the records.
        file: The SVG file.
    """
    rows, published = _drawn(experiment)
    columns = [(row, record) for row, record in rows if len(_columns(record)) > 2]
    panels = 3 if columns else 2
    size = (5.4 * panels, 5.4)
    words = describe_figure(experiment)
    with drawing(file, words, ncols=panels, figsize=size, sharey=True) as (figure, axes):
        for index, (row, record) in enumerate(rows):
            look = {"color": f"C{index % 10}", "label": row.label, "zorder": 2}
            look["marker"] = "v" if record.likelihood == "bound" else "o"
            timed = seconds_of_1000(record)
            found = bits_of(record)
            look["linewidth"] = 2
            _line(axes[0], found.items(), look)
            _line(axes[1], ((timed[passes], found[passes]) for passes in timed), look)
            if len(_columns(record)) > 2:
                look |= {"marker": "", "linewidth": 1.2}
                _line(axes[2], enumerate(_columns(record)), look)
        for point in published:
            for place, at in ((axes[0], point.passes), (axes[1], point.seconds)):
                if at is not None:
                    place.scatter(at, point.bpc, **PUBLISHED)
                    where = {"xytext": (0, -11), "textcoords": "offset points", "ha": "center"}
                    place.annotate(point.label, (at, point.bpc), fontsize=7, color="grey", **where)
        _finish(axes, [record for _, record in rows])
        handles, labels = axes[0].get_legend_handles_labels()
        if published:
            handles.append(axes[0].scatter([], [], **PUBLISHED))
            labels.append("published, unreproduced")
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)


def _line(place: Any, points: Any, look: dict[str, Any]) -> None:
    # A line without points still enters the legend.
    place.plot(*zip(*(list(points) or [(math.nan, math.nan)]), strict=True), **look)


def _columns(record: Record) -> list[float]:
    """Returns the bits of each column of the window, if the record has them."""
    found: list[float] = record.metrics.get("level_bpc", [])
    return found


def _finish(axes: Any, records: Sequence[Record]) -> None:
    """Names and scales the axes."""
    from matplotlib.ticker import FixedLocator, NullLocator

    # Linear up to 1, for an n-gram model takes no pass.
    axes[0].set_xscale("symlog", base=2, linthresh=1)
    most = max([1, *(passes for record in records for passes in bits_of(record))])
    axes[0].set_xlim(-0.2, 2 * most)
    axes[0].xaxis.set_major_formatter("{x:.0f}")
    axes[0].set_xlabel("passes: network evaluations one after the other")
    bounds = any(record.likelihood == "bound" for record in records)
    note = " (triangles: bounds)" if bounds else ", exact"
    # Logarithmic, since the systems that compete are close to each other.
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(FixedLocator(TICKS))
    axes[0].yaxis.set_major_formatter("{x:.1f}")
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel(f"bits per character, test{note}")
    if any(seconds_of_1000(record) for record in records):
        axes[1].set_xscale("log")
    axes[1].set_xlabel("seconds to generate 1,000 characters of one sequence")
    if len(axes) > 2:
        axes[2].set_xlabel("column of a lane, in the order of generation")
    for place in axes:
        place.grid(alpha=0.3)
        for side in ("top", "right"):
            place.spines[side].set_visible(False)
