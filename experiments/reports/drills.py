"""The table of the drills: what happened to processes, and how they ended."""

from collections.abc import Sequence

from dflows.records import Record
from experiments.reports.markdown import table

__all__ = ["render"]


def render(records: Sequence[Record]) -> str:
    """Renders the records of `python -m experiments.drills`.

    Args:
        records: The records, escaped, of drills that ended as promised.

    Returns:
        Markdown: a table of what happened, with all drills of one kind in one row.
    """
    kinds: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.config["number"]):
        kinds.setdefault(record.config["happens"], []).append(record)
    rows = []
    for happens, some in kinds.items():
        codes = {int(code) for record in some for code in record.metrics["exit_codes"]}
        last = max(record.metrics["seconds_to_end"] for record in some)
        allowed = some[0].config["within"]
        shown = (len(some), ", ".join(map(str, sorted(codes))), f"{last:.1f}", f"{allowed:.0f}")
        rows.append([f"{happens}: {some[0].config['promise']}", *map(str, shown)])
    head = ("what happens: what is promised", "drills", "exit codes", "seconds, at most", "allowed")
    devices = ", ".join(dict.fromkeys(record.device for record in records))
    return f"{len(records)} drills ended as promised ({devices}).\n\n{table(head, rows)}"
