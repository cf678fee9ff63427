"""Tables in Markdown, and the generated blocks of pages."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dflows.errors import UserError
from dflows.files import atomic_write
from dflows.records import Record

__all__ = [
    "BEGIN",
    "END",
    "MISSING",
    "escape",
    "escaped",
    "mean_and_spread",
    "number",
    "table",
    "update_page",
    "write_page",
]

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
MISSING = "–"
_SIGNS = re.compile(
    r"[\\`*~\[\]<>|&$!#:@{}]"
    # An underscore within a word, as names have it, and a point elsewhere are themselves.
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=www)\."
)


def number(value: float | None, form: str = ".3f") -> str:
    """Formats a number, or `None` as a dash."""
    return MISSING if value is None else format(value, form)


def escape(text: str) -> str:
    """Returns Markdown that shows a text as it is, on one line.

    Example:
        >>> escape("a <b>")
        'a &#60;b&#62;'
    """
    # References, since the representation of a list doubles backslashes.
    return _SIGNS.sub(lambda sign: f"&#{ord(sign[0])};", " ".join(text.split()))


def escaped(record: Record) -> Record:
    """Returns a record of which no text but its samples is Markdown; a stranger may have made it.

    Args:
        record: The record. Samples, which may be of any shape, are shown as code.
    """
    texts: dict[str, Any] = {
        key: escape(getattr(record, key)) for key in ("device", "precision", "budget")
    }
    return replace(record, config=_escaped(record.config), **texts)


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {key: _escaped(entry) for key, entry in value.items()}
    return [_escaped(entry) for entry in value] if isinstance(value, list) else value


def mean_and_spread(values: Sequence[float], form: str = ".3f") -> str:
    """Formats the mean of values, and their standard deviation where there are several.

    Example:
        >>> mean_and_spread([1.0, 2.0, 3.0]), mean_and_spread([1.5])
        ('2.000 ± 1.000 (3)', '1.500')
    """
    if not values:
        return MISSING
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form)} ({len(values)})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Renders a table in Markdown, its first column text and the others numbers.

    Args:
        head: The names of the columns.
        rows: The cells.

    Example:
        >>> print(table(["row", "nats"], [["base", "7.6"]]))
        | row | nats |
        | --- | ---: |
        | base | 7.6 |
    """
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def update_page(text: str, figures: str, name: str) -> str:
    """Replaces the generated block of a page.

    Args:
        text: The page.
        figures: What goes between the marks.
        name: The name of the page, for the message.

    Raises:
        UserError: If the marks are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{name} has no lines {BEGIN} and {END}: add them where the table goes")
    return f"{before}{BEGIN}\n{figures}\n{END}{after}"


def write_page(page: Path, figures: str) -> None:
    """Replaces the generated block of a file, whole or not at all.

    Raises:
        UserError: If the file or its marks are missing.
    """
    if not page.is_file():
        raise UserError(f"{page} is missing: run this in the project's folder")
    text = update_page(page.read_text(encoding="utf-8"), figures, page.name)
    with atomic_write(page) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
