"""The table of the Potts experiment."""

from experiments.reports.experiment import Experiment
from experiments.reports.markdown import mean_and_spread, number, table

__all__ = ["render"]

HEAD = ("model", "published", "ours", "best tables found", "above the entropy", "passes")


def render(experiment: Experiment) -> str:
    """Renders a table for every lattice, number of states and coupling.

    Args:
        experiment: The plan and the records.

    Returns:
        Markdown.
    """
    parts = []
    for task in experiment.plan.tasks:
        lines = [_row(experiment, task, name) for name, _ in experiment.rows(task)]
        if lines:
            side, num_classes, coupling = (
                experiment.setting(task, f"data.init_args.{key}")
                for key in ("side", "num_classes", "coupling")
            )
            parts.append(
                f"**D = {side**2}, K = {num_classes}, J = {coupling}**: exact "
                f"entropy {number(experiment.first(task, 'entropy'))} nats, factorized "
                f"{number(experiment.first(task, 'factorized_entropy'))}.\n\n{table(HEAD, lines)}"
            )
    return "\n\n".join(parts)


def _row(experiment: Experiment, task: str, name: str) -> list[str]:
    row = experiment.plan.rows[name]
    exact = experiment.values(name, task, "exact_nats")
    values = exact or experiment.values(name, task, "test_nats")
    entropy = experiment.first(task, "entropy")
    above = None
    if values and entropy is not None:
        above = sum(values) / len(values) - entropy
    # A mean over samples has a standard error.
    errors = [] if exact else experiment.values(name, task, "standard_error_nats")
    off = f", standard error {max(errors):.4f}" if errors else ""
    shown = mean_and_spread(values) + ("" if exact else f" (test samples{off})")
    published = row.published.get(task)
    below = published is not None and entropy is not None and published < entropy
    return [
        row.label,
        number(published, ".2f") + (" (below the entropy)" if below else ""),
        shown,
        number(experiment.reference(row, task)),
        number(above, "+.4f" if exact else "+.3f"),
        mean_and_spread(experiment.values(name, task, "passes")[:1], ".0f"),
    ]
