"""The score of a text as one HTML page, which opens without a network."""

import base64
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflows.cli.scoring import Line, Place, Scored

__all__ = ["render_page"]

THOUSANDS, MOST, NONE = 1000, 65534, 65535
"""Bits are held in thousandths, up to 65; so are −log₂ of probabilities."""
WORST = 20
SNIPPET = 120
AROUND = 30


def render_page(scored: Sequence[Scored], names: Sequence[str], title: str) -> str:
    """Renders a page in which each character has the colour of its bits.

    A character under the pointer shows its bits, when it was drawn, and what the model held
    likelier. Characters off the screen are plain text, so that a megabyte scrolls as a page does.

    Args:
        scored: The score of the text by one model, or by two, which are compared.
        names: What the models are called.
        title: What the text is called.
    """
    first = scored[0]
    data = {
        "text": _writable(first.text),
        "exact": all(one.exact_terms for one in scored),
        "models": [_model(one, name) for one, name in zip(scored, names, strict=True)],
        "worst": [_line(first, line) for line in first.surprising_lines(WORST)],
        "places": [_place(first, place) for place in first.places(WORST)],
    }
    written = json.dumps(data, ensure_ascii=True)
    for sign in "<>&":  # in JSON, all that HTML could take for markup can be escaped
        written = written.replace(sign, f"\\u{ord(sign):04x}")
    page = files("dflows.cli").joinpath("page.html").read_text(encoding="utf-8")
    shown = "".join(sign if sign.isprintable() else "\ufffd" for sign in title)
    parts = {"title": html.escape(shown), "data": written}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


def _packed(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode("ascii")


def _packed_bits(bits: NDArray[np.float64]) -> str:
    thousandths = np.minimum(np.rint(THOUSANDS * np.maximum(bits, 0)), MOST)
    return _packed(np.where(np.isnan(bits), NONE, thousandths), "<u2")


def _model(scored: Scored, name: str) -> dict[str, Any]:
    unknown = len(scored.text) - scored.scored
    summary = (
        f"{name}: {scored.total:,.0f} bits, {scored.scored:,} characters, "
        f"{scored.bits_per_character:.4f} bits each"
    )
    found: dict[str, Any] = {
        "name": name,
        "summary": summary + (f"; {unknown:,} have no class" if unknown else ""),
        "bits": _packed_bits(scored.bits),
    }
    if scored.drawn is not None:
        found["drawn"] = _packed(np.where(scored.drawn < 0, NONE, scored.drawn), "<u2")
        found["passes"] = scored.passes
    if scored.likelier is not None:
        counts, classes, probs = scored.likelier
        found["counts"] = _packed(counts, "u1")
        found["classes"] = _packed(classes, "<u2")
        found["probs"] = _packed_bits(-np.log2(probs))
        found["symbols"] = [
            scored.vocabulary.decode([one]) for one in range(scored.vocabulary.num_classes)
        ]
    return found


def _place(scored: Scored, place: Place) -> dict[str, Any]:
    around = slice(max(0, place.index - AROUND), place.index + AROUND)
    return {
        "number": place.line,
        "begin": place.index,
        "end": place.index + 1,
        "bits": f"{place.bits:.1f}",
        "mean": f"column {place.column}",
        "text": _shown(scored.text[around]),
    }


def _shown(text: str) -> str:
    return _writable(text).replace("\n", "↵")


def _writable(text: str) -> str:
    """Returns a text without halves of surrogate pairs, which no page can hold."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _line(scored: Scored, line: Line) -> dict[str, Any]:
    text = _shown(scored.text[line.begin : line.end].rstrip("\n"))
    return {
        "number": line.number,
        "begin": line.begin,
        "end": line.end,
        "bits": f"{line.bits:.1f}",
        "mean": f"{line.bits_per_character:.2f} each",
        "text": text[:SNIPPET] + ("…" if len(text) > SNIPPET else ""),
    }
