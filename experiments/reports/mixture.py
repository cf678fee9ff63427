"""The table and the figure of the mixture experiment."""

import math
import textwrap
from pathlib import Path

import torch

from experiments.references import task_data
from experiments.reports.experiment import Experiment
from experiments.reports.figures import drawing
from experiments.reports.markdown import mean_and_spread, number, table

__all__ = ["describe_figure", "draw", "render"]

SHOWN = (
    "factorized-base",
    "affine-paper-1",
    "affine-1",
    "rank-1",
    "affine-paper-6",
    "affine-6",
    "rank-6",
)
"""Rows with a panel in the figure."""


def render(experiment: Experiment) -> str:
    """Renders a table of the divergences on every arrangement.

    Args:
        experiment: The plan and the records.

    Returns:
        Markdown.
    """
    parts = []
    for task in experiment.plan.tasks:
        entropy = experiment.first(task, "entropy")
        rows = []
        for name, row in experiment.rows(task):
            layerwise = experiment.reference(row, task, "layerwise_nats")
            rows.append(
                [
                    row.label,
                    mean_and_spread(experiment.values(name, task, "kl")),
                    number(None if layerwise is None or entropy is None else layerwise - entropy),
                    number(experiment.reference(row, task, "reference_kl")),
                ]
            )
        if rows:
            caption = (
                f"**{task}**: entropy {number(entropy)} nats, best "
                f"factorized model {number(experiment.first(task, 'factorized_kl'))} above it."
            )
            head = ["model", "KL, exact nats", "tables, layerwise", "best tables found"]
            parts.append(f"{caption}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def describe_figure(experiment: Experiment) -> str:
    """Returns the divergences in the titles of the panels."""
    parts = [
        f"{task}, {row.label}: {mean_and_spread(experiment.values(name, task, 'kl'))}"
        for task in experiment.plan.tasks
        for name, row in experiment.rows(task)
        if name in SHOWN
    ]
    return "Heat maps of probabilities, with KL in nats. " + "; ".join(parts)


def draw(experiment: Experiment, file: Path) -> None:
    """Draws the exact probabilities of the data and of the models, side by side.

    Args:
        experiment: The plan and the records.
        file: The SVG file.
    """
    tasks = [task for task in experiment.plan.tasks if [*experiment.rows(task)]]
    shown = [name for name in SHOWN if name in experiment.plan.rows]
    size = (2 * (1 + len(shown)), 2.3 * len(tasks))
    options = {"nrows": len(tasks), "ncols": 1 + len(shown), "squeeze": False}
    with drawing(file, describe_figure(experiment), figsize=size, **options) as (_, axes):
        for line, task in zip(axes, tasks, strict=True):
            first, _ = next(experiment.rows(task))
            truth = task_data(experiment.of(first, task)[0].config).probabilities
            most = float(truth.max())
            _panel(line[0], truth, most, f"data, {task}")
            for axis, name in zip(line[1:], shown, strict=True):
                records = experiment.of(name, task)
                if not records or "probabilities" not in records[0].metrics:
                    axis.set_axis_off()
                    continue
                values = torch.tensor(records[0].metrics["probabilities"])
                side = math.isqrt(len(values))
                row = experiment.plan.rows[name]
                title = f"{textwrap.fill(row.label, 28)}\nKL {number(records[0].metrics.get('kl'))}"
                if (best := experiment.reference(row, task, "reference_kl")) is not None:
                    title += f", best table {best:.3f}"
                _panel(axis, values.reshape(side, side), most, title)


def _panel(axes: object, table: torch.Tensor, most: float, title: str) -> None:
    # Square roots show the little mass between the modes.
    axes.imshow(table.sqrt().T.numpy(), origin="lower", cmap="magma", vmin=0, vmax=most**0.5)  # type: ignore[attr-defined]
    axes.set_title(title, fontsize=8)  # type: ignore[attr-defined]
    axes.set_xticks([])  # type: ignore[attr-defined]
    axes.set_yticks([])  # type: ignore[attr-defined]
