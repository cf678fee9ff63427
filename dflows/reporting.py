"""What the parts of a run say of themselves: rows of its table, metrics of its record.

A module reports what it was scored, what it is and how fast it generates
(:class:`lightning_modules.BaseModule`); data report what the scores are compared with
(:class:`ReportsData`). Commands only collect.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

__all__ = ["Report", "ReportsData", "Row", "Score"]


class Row(NamedTuple):
    """One line of the table: what it is of, the figure, and a remark."""

    what: str
    value: str
    remark: str = ""


@dataclass
class Report:
    """Creates a report, empty unless something is given.

    Args:
        metrics: Values by the names of :data:`dflows.records.METRICS`.
        rows: Rows of the table.

    Example:
        >>> report = Report({"passes": 3}).row("passes to generate", "3")
        >>> report += Report({"characters": {"valid": 10}})
        >>> report += Report({"characters": {"test": 20}})
        >>> report.metrics
        {'passes': 3, 'characters': {'valid': 10, 'test': 20}}
        >>> report.rows
        [Row(what='passes to generate', value='3', remark='')]
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def row(self, what: str, value: str, remark: str = "") -> Self:
        """Adds a row and returns the report."""
        self.rows.append(Row(what, value, remark))
        return self

    def __iadd__(self, other: "Report") -> Self:
        """Adds all of another report; metrics by split are merged split by split."""
        for name, value in other.metrics.items():
            known = self.metrics.get(name)
            if isinstance(value, dict) and isinstance(known, dict):
                value = {**known, **value}
            self.metrics[name] = value
        self.rows += other.rows
        return self


@dataclass(frozen=True)
class Score:
    """Creates the likelihood that a model gave to a split.

    Args:
        split: `valid` or `test`.
        bpc: Bits per character.
        characters: Characters scored, by all processes.
        examples: Examples scored, by all processes.
        standard_error: Of the nats per example.

    Example:
        >>> round(Score("test", bpc=2.0, characters=40, examples=10).nats, 3)  # 8 bits an example
        5.545
    """

    split: str
    bpc: float
    characters: int
    examples: int
    standard_error: float = 0.0

    @property
    def nats(self) -> float:
        """Nats per example."""
        return self.bpc * math.log(2) * self.characters / self.examples


@runtime_checkable
class ReportsData(Protocol):
    """Data that say what scores are compared with."""

    def report(self, score: Score) -> Report:
        """Reports the entropies of a split that was scored.

        Raises:
            CertificateError: If the score lies below the entropy of the data.
        """

    def report_expected(self, model: Any, max_states: int) -> Report:
        """Reports the exact expected loss, where the distribution is known and small enough.

        Raises:
            CertificateError: If it lies below the entropy.
        """

    def report_samples(self, samples: list[str]) -> Report:
        """Reports generated events, where they are text."""
