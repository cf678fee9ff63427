"""The table of archives: what they add to a text, beside other compressors."""

from collections.abc import Sequence

from dflows.records import Record
from experiments.reports.markdown import number, table

__all__ = ["render"]


def render(records: Sequence[Record]) -> str:
    """Renders the records of `python -m dflows.compress --benchmark --record`.

    Args:
        records: The records, escaped.

    Returns:
        Markdown: a table for every text.
    """
    parts = []
    texts = {tuple(record.metrics["characters"].items()) for record in records}
    for text in sorted(texts):
        some = [record for record in records if tuple(record.metrics["characters"].items()) == text]
        name, symbols = text[0]
        parts.append(_text(name, symbols, some))
    return "\n\n".join(parts)


def _text(name: str, symbols: int, records: Sequence[Record]) -> str:
    def cells(cold: int | None, primed: int | None, weights: int = 0) -> list[str]:
        whole = None if cold is None and not weights else (cold or primed or 0) + weights
        bits = [None if size is None else 8 * size / symbols for size in (cold, primed, whole)]
        return [
            number(cold, ",d"),
            number(bits[0]),
            number(primed, ",d"),
            number(bits[1]),
            number(bits[2]),
        ]

    rows = []
    for record in sorted(records, key=lambda record: record.metrics["archive_bytes"]):
        metrics = record.metrics
        label = f"{record.name.removesuffix('-archive')}, {metrics['passes']} passes"
        own = cells(None, metrics["archive_bytes"], metrics["weights_bytes"])
        times = [metrics.get(key) for key in ("archive_seconds", "archive_seconds_back")]
        rows.append([label, *own, *(number(seconds, ",.0f") for seconds in times)])
    first = records[0].metrics
    primed = first.get("primed_bytes", {})
    others = first.get("compressed_bytes", {})
    for other, size in sorted(others.items(), key=lambda pair: primed.get(pair[0], pair[1])):
        rows.append([other, *cells(size, primed.get(other)), number(None), number(None)])
    head = ["", "bytes", "bits", "primed, bytes", "primed, bits", "with the model, bits"]
    head += ["encoded, s", "decoded, s"]
    devices = ", ".join(dict.fromkeys(record.device for record in records))
    caption = (
        f"{name}, {symbols:,} characters; bits are those of a character. Primed: what the text "
        "adds behind the training split, which the models have learned from. With the model: its "
        f"weights counted, in the type that they are held in ({devices})."
    )
    return f"{caption}\n\n{table(head, rows)}"
