"""What all tables are made from: records, by row and task of the plan."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dflows.errors import UserError
from dflows.records import Record, read_records
from experiments.plan import PLANS, Plan, Row, read_plan, reference_name
from experiments.reports.markdown import escaped

__all__ = ["Experiment", "read_experiment", "setting"]


def setting(config: Mapping[str, Any], key: str) -> Any:
    """Returns the value of a dotted key in a configuration, or `None`.

    Example:
        >>> setting({"trainer": {"max_steps": 500}}, "trainer.max_steps")
        500
    """
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True)
class Experiment:
    """Creates an experiment that has run: its plan, and its records.

    Args:
        plan: The plan.
        records: Records, by their names.
    """

    plan: Plan
    records: dict[str, list[Record]]

    def escaped(self) -> "Experiment":
        """Returns the experiment with texts of records that show as they are in Markdown."""
        records = {name: [*map(escaped, found)] for name, found in self.records.items()}
        return replace(self, records=records)

    def of(self, row: str, task: str) -> list[Record]:
        """Returns the records of a row on a task, one a seed."""
        return self.records.get(f"{row}-{task}", [])

    def setting(self, task: str, key: str) -> Any:
        """Returns the value of a dotted key in the configuration of a task's first record."""
        first = next((name for name, _ in self.rows(task)), None)
        return None if first is None else setting(self.of(first, task)[0].config, key)

    def values(self, row: str, task: str, metric: str) -> list[float]:
        """Returns a metric of a row on a task, one value a seed."""
        return [record.metrics[metric] for record in self.of(row, task) if metric in record.metrics]

    def reference(self, row: Row, task: str, metric: str = "reference_nats") -> float | None:
        """Returns what the best tabular flow of a row reaches on a task, or `None`.

        Raises:
            UserError: If it was found for another distribution than the runs'.
        """
        if row.reference is None:
            return None
        found = self.records.get(reference_name(row.reference, task), [])
        entropy = self.first(task, "entropy")
        if found and entropy is not None and "entropy" in found[0].metrics:
            _check_shared(task, "entropy", [entropy, found[0].metrics["entropy"]])
        return found[0].metrics.get(metric) if found else None

    @property
    def labels(self) -> dict[str, list[str]]:
        """The names of the rows of each label; several rows may share one."""
        names: dict[str, list[str]] = {}
        for name, row in self.plan.rows.items():
            names.setdefault(row.label, []).append(name)
        return names

    def first(self, task: str, metric: str) -> float | None:
        """Returns a metric that all records of a task share.

        Raises:
            UserError: If they do not.
        """
        found = [value for row in self.plan.rows for value in self.values(row, task, metric)]
        _check_shared(task, metric, found)
        return found[0] if found else None

    def rows(self, task: str) -> Iterator[tuple[str, Row]]:
        """Returns the rows that a task has records of."""
        for name, row in self.plan.rows.items():
            if self.of(name, task):
                yield name, row


def _check_shared(task: str, metric: str, values: Sequence[float]) -> None:
    if values and not math.isclose(min(values), max(values), rel_tol=1e-6, abs_tol=1e-6):
        raise UserError(
            f"records of {task} differ in {metric}, {min(values):.6f} and {max(values):.6f}, so "
            "they are of different distributions: run with the same --overlay, or add --again"
        )


def read_experiment(name: str, results: Path) -> Experiment:
    """Reads the plan and the records of an experiment.

    Args:
        name: Name of the experiment.
        results: Folder of all records.

    Raises:
        UserError: If the plan or a record cannot be read.
    """
    records: dict[str, list[Record]] = {}
    for record in read_records(results / name):
        records.setdefault(record.name, []).append(record)
    return Experiment(read_plan(PLANS / f"{name}.yaml"), records)
