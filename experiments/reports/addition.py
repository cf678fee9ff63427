"""The table of the addition experiment."""

from experiments.reports.experiment import Experiment
from experiments.reports.markdown import mean_and_spread, number, table

__all__ = ["render"]

HEAD = ("model", "published, nats", "ours, test nats", "exact sums", "steps", "seconds")


def render(experiment: Experiment) -> str:
    """Renders a table for every number of digits.

    Args:
        experiment: The plan and the records.

    Returns:
        Markdown.
    """
    parts = []
    for task in experiment.plan.tasks:
        rows = []
        for name, row in experiment.rows(task):
            values = experiment.values
            rows.append(
                [
                    row.label,
                    number(row.published.get(task), ".2f"),
                    mean_and_spread(values(name, task, "test_nats"), ".4f"),
                    mean_and_spread(values(name, task, "accuracy"), ".2%"),
                    mean_and_spread(values(name, task, "steps"), ",.0f"),
                    mean_and_spread(values(name, task, "train_seconds"), ".0f"),
                ]
            )
        if rows:
            length = experiment.setting(task, "data.init_args.length")
            parts.append(f"**{length} digits**; floor 0.\n\n{table(HEAD, rows)}")
    return "\n\n".join(parts)
