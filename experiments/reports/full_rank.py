"""The tables of the full-rank experiment."""

import statistics

from dflows.exact import share_of_gap
from experiments.plan import Row, reference_name
from experiments.reports.experiment import Experiment
from experiments.reports.markdown import mean_and_spread, number, table

__all__ = ["render"]

HEAD = (
    "model",
    "published",
    "ours, exact",
    "tables, layerwise",
    "best tables found",
    "above the reference",
    "gap closed",
    "steps",
    "seconds",
)


def render(experiment: Experiment) -> str:
    """Renders a table for every task.

    Args:
        experiment: The plan and the records.

    Returns:
        Markdown.
    """
    return "\n\n".join(
        _task(experiment, task) for task in experiment.plan.tasks if [*experiment.rows(task)]
    )


def _task(experiment: Experiment, task: str) -> str:
    entropy = experiment.first(task, "entropy")
    factorized = experiment.first(task, "factorized_entropy")
    length, num_classes = (
        experiment.setting(task, f"data.init_args.{key}") for key in ("length", "num_classes")
    )
    caption = (
        f"**D = {length}, K = {num_classes}**: entropy {number(entropy)} nats, best factorized "
        f"model {number(factorized)}."
    )
    best = [
        record.metrics["exhaustive_nats"]
        for name in experiment.plan.references
        for record in experiment.records.get(reference_name(name, task), [])
        if "exhaustive_nats" in record.metrics
    ]
    if best:
        caption += (
            " The best of all bijections of the states, on a factorized base, reaches "
            f"{number(best[0])}."
        )
    rows = [_row(experiment, task, name, row) for name, row in experiment.rows(task)]
    return f"{caption}\n\n{table(HEAD, rows)}"


def _greedy(experiment: Experiment, task: str, row: Row) -> bool:
    """Says whether the reference of a row was fitted layerwise, without ascent."""
    return row.reference is not None and task in experiment.plan.references[row.reference].greedy


def _row(experiment: Experiment, task: str, name: str, row: Row) -> list[str]:
    exact = experiment.values(name, task, "exact_nats")
    reference = experiment.reference(row, task)
    entropy = experiment.first(task, "entropy")
    factorized = experiment.first(task, "factorized_entropy")
    above = share = None
    if exact and reference is not None:
        above = statistics.fmean(exact) - reference
    if exact and entropy is not None and factorized is not None and factorized - entropy > 1e-9:
        # Rounded, and no negative zero.
        share = round(share_of_gap(statistics.fmean(exact), entropy, factorized), 2) + 0.0
    return [
        row.label,
        number(row.published.get(task), ".1f"),
        mean_and_spread(exact),
        number(experiment.reference(row, task, "layerwise_nats")),
        number(None if _greedy(experiment, task, row) else reference),
        number(above, "+.3f"),
        number(share, ".0%"),
        mean_and_spread(experiment.values(name, task, "steps")[:1], ",.0f"),
        mean_and_spread(experiment.values(name, task, "train_seconds")[:1], ".0f"),
    ]
