"""The tables and the figure of the experiment on objectives and gradient rules."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dflows.records import Record
from experiments.plan import gradients_name
from experiments.reports.experiment import Experiment, setting
from experiments.reports.figures import drawing
from experiments.reports.markdown import MISSING, mean_and_spread, number, table

__all__ = ["describe_figure", "draw", "render"]

ORDERINGS = "model.init_args.flow.init_args.orderings"
"""Key of the list with an entry for every transform."""

_MEASURED = {
    "cosine": ".3f",
    "norm_ratio": ".3g",
    "mixture_cosine": ".3f",
    "mixture_norm_ratio": ".3g",
    "standard_error": ".2g",
    "variance": ".3g",
}


class Group(NamedTuple):
    """Tasks that a table shows side by side, by their number of transforms."""

    length: int
    num_classes: int
    timed: bool


def _size(data: Mapping[str, Any]) -> tuple[int, int]:
    return setting(data, "init_args.length"), setting(data, "init_args.num_classes")


def _groups(experiment: Experiment) -> dict[Group, dict[int, str]]:
    """Groups the tasks by size and by what ends their runs: number of transforms → task."""
    groups: dict[Group, dict[int, str]] = {}
    for task in experiment.plan.tasks:
        if transforms := len(experiment.setting(task, ORDERINGS) or []):
            timed = experiment.setting(task, "trainer.max_time") is not None
            group = Group(*_size(experiment.setting(task, "data")), timed)
            groups.setdefault(group, {})[transforms] = task
    return groups


def render(experiment: Experiment) -> str:
    """Renders the likelihoods by the number of transforms, and the gradients.

    Args:
        experiment: The plan and the records.

    Returns:
        Markdown.
    """
    parts = [_likelihoods(experiment, group, tasks) for group, tasks in _groups(experiment).items()]
    return "\n\n".join([*parts, *_gradients(experiment)])


def _transforms(number_of: int) -> str:
    return f"{number_of} transform{'s' if number_of > 1 else ''}"


def _exact(experiment: Experiment, names: list[str], task: str) -> list[float]:
    return [nats for name in names for nats in experiment.values(name, task, "exact_nats")]


def _distance(experiment: Experiment, names: list[str], task: str) -> float | None:
    """Returns how far rows end from the best tabular flow."""
    exact, found = _exact(experiment, names, task), _reference(experiment, task)
    return sum(exact) / len(exact) - found if exact and found is not None else None


def _cell(experiment: Experiment, names: list[str], task: str) -> str:
    """Returns the likelihood and the seconds of training."""
    exact = _exact(experiment, names, task)
    seconds = [value for name in names for value in experiment.values(name, task, "train_seconds")]
    if not exact:
        return MISSING
    return f"{mean_and_spread(exact)} ({number(min(seconds, default=None), '.0f')} s)"


def _likelihoods(experiment: Experiment, group: Group, tasks: dict[int, str]) -> str:
    entropy = number(experiment.first(next(iter(tasks.values())), "entropy"))
    ends = "equal seconds" if group.timed else "equal steps"
    lines = []
    for label, names in experiment.labels.items():
        cells = [_cell(experiment, names, task) for task in tasks.values()]
        if any(cell != MISSING for cell in cells):
            lines.append([label, *cells])
    for label, metric in (
        ("*tables, layerwise*", "layerwise_nats"),
        ("*best tabular flow*", "reference_nats"),
    ):
        found = [_reference(experiment, task, metric) for task in tasks.values()]
        lines.append([label, *map(number, found)])
    head = ["objective or rule", *map(_transforms, tasks)]
    return (
        f"**D = {group.length}, K = {group.num_classes}, {ends}**: exact nats, and seconds of "
        f"training; entropy {entropy}.\n\n"
        f"{table(head, lines)}"
    )


def _reference(experiment: Experiment, task: str, metric: str = "reference_nats") -> float | None:
    """Returns what tables of a task's size and number of transforms reach."""
    wanted = _size(experiment.setting(task, "data")), len(experiment.setting(task, ORDERINGS))
    for record, *_ in experiment.records.values():
        if record.kind != "reference":
            continue
        if (_size(record.config["data"]), len(record.config["orderings"])) == wanted:
            value: float | None = record.metrics.get(metric)
            return value
    return None


def _compared(experiment: Experiment, row: str, task: str) -> list[Record]:
    """Returns the records of a row's gradients on a task."""
    return experiment.records.get(gradients_name(row, task), [])


def _gradients_size(record: Record) -> tuple[int, int, int]:
    """Returns the length, classes and transforms of the flow that gradients were compared at."""
    trained = record.config["trained"]
    return *_size(trained["data"]), len(setting(trained, ORDERINGS))


def _gradients(experiment: Experiment) -> list[str]:
    head = [
        "objective or rule",
        "cosine",
        "norm ratio",
        "with the mixture's",
        "norm ratio",
        "standard error",
        "variance",
    ]
    parts = []
    for task in experiment.plan.tasks:
        lines, caption = [], ""
        for name, row in experiment.plan.rows.items():
            for record in _compared(experiment, name, task):
                length, num_classes, transforms = _gradients_size(record)
                size = f"D = {length}, K = {num_classes}, {_transforms(transforms)}"
                caption = f"**Gradients, {size}**"
                measured = [
                    number(record.metrics.get(f"gradient_{metric}"), form)
                    for metric, form in _MEASURED.items()
                ]
                lines.append([row.label, *measured])
        if lines:
            parts.append(f"{caption}\n\n{table(head, lines)}")
    return parts


def describe_figure(experiment: Experiment) -> str:
    """Returns what the first panel shows, in words."""
    parts = []
    tasks = _groups(experiment).get(Group(5, 5, timed=False), {})
    for label, names in experiment.labels.items():
        distances = [_distance(experiment, names, task) for task in tasks.values()]
        if any(distance is not None for distance in distances):
            parts.append(f"{label}: {', '.join(number(distance) for distance in distances)}")
    return "Nats above the best tabular flow. " + "; ".join(parts)


def draw(experiment: Experiment, file: Path) -> None:
    """Draws the distance to the tabular reference and the gradients' cosine.

    Args:
        experiment: The plan and the records.
        file: The SVG file.
    """
    tasks = _groups(experiment).get(Group(5, 5, timed=False), {})
    with drawing(file, describe_figure(experiment), ncols=3, figsize=(11, 4.2)) as (figure, axes):
        for number_of, (label, names) in enumerate(experiment.labels.items()):
            color = f"C{number_of}"
            pairs = [(count, _distance(experiment, names, task)) for count, task in tasks.items()]
            _line(axes[0], pairs, label, color)
            measured = _cosines(experiment, names)
            _line(axes[1], [(count, value) for k, count, value in measured if k == 5], label, color)
            by_classes = sorted((k, value) for k, count, value in measured if count == 2)
            _line(axes[2], by_classes, None, color)
        for place, (x, title) in zip(
            axes,
            (
                ("transforms", "nats above the best tabular flow\n(D = 5, K = 5)"),
                ("transforms", "cosine with the exact gradient\n(D = 3, K = 5)"),
                ("classes K", "cosine with the exact gradient\n(D = 3, 2 transforms)"),
            ),
            strict=True,
        ):
            place.set_xlabel(x)
            place.set_title(title, fontsize=9)
            place.set_xscale("log", base=2)
            place.xaxis.set_major_formatter("{x:.0f}")
        axes[0].axhline(0, color="grey", linewidth=1, linestyle="--")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")


def _cosines(experiment: Experiment, names: list[str]) -> list[tuple[int, int, float]]:
    """Returns the classes, transforms and cosine of each task that gradients were compared on."""
    return [
        (*_gradients_size(record)[1:], record.metrics["gradient_cosine"])
        for task in experiment.plan.tasks
        for name in names
        for record in _compared(experiment, name, task)
        if "gradient_cosine" in record.metrics
    ]


def _line(
    axes: object, pairs: Sequence[tuple[int, float | None]], label: str | None, color: str
) -> None:
    known = [(x, y) for x, y in pairs if y is not None]
    if known:
        axes.plot(*zip(*known, strict=True), marker="o", label=label, color=color)  # type: ignore[attr-defined]
