"""Scores a text with a checkpoint, character by character; or an array, row by row.

    python -m dflows.score --checkpoint runs/lstm/version_0 letter.txt
    python -m dflows.score --checkpoint runs/lstm/version_0 letter.txt --format html -o letter.html

It prints the bits of the whole, the lines and the places that surprise the model most. As JSON
lines (``--format jsonl``) there is an object for every line and one for the whole. As a page
(``--format html``) each character has the colour of its bits, and shows what was held likelier.
With ``--compare``, another checkpoint scores the same text, for a comparison.

A text is cut into windows, as `python -m dflows.evaluate` cuts it; a model that reads from left to
right can be given the end of the window before: ``--overlap 64``. `-` is the standard input.

A model of rows of integers scores an array, a file .npy or .npz. It prints the nats of a row, and
the rows and columns that surprise the model most; as JSON lines, there are the nats of every row
and of each of its columns.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dflows.cli.checkpoints import add_checkpoint_arguments, load_model, read_checkpoint
from dflows.cli.configs import Parser
from dflows.cli.errors import run_command
from dflows.cli.models import add_size_arguments, check_counts, find_device, resized_flow
from dflows.cli.noise import quiet
from dflows.cli.page import render_page
from dflows.cli.rows import score_array
from dflows.cli.scoring import Scored, score
from dflows.cli.streams import STANDARD, console_of, opened, write

__all__ = ["main", "score_text"]

WORST = 10
AROUND = 20


def _parser() -> Parser:
    parser = Parser(prog="python -m dflows.score")
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "input",
        type=str,
        help="The text, in UTF-8; - is the standard input. Of rows, a file .npy or .npz.",
    )
    parser.add_argument(
        "--compare", type=str | None, default=None, help="Another checkpoint, for a comparison."
    )
    parser.add_argument("--format", type=Literal["table", "jsonl", "html"], default="table")
    parser.add_argument(
        "-o", "--output", type=str | None, default=None, help="A file; the standard output."
    )
    add_size_arguments(parser)
    parser.add_argument(
        "--overlap", type=int, default=0, help="Characters known from the window before."
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, …")
    return parser


def score_text(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments.

    Raises:
        UserError: If the arguments cannot be honoured.
    """
    quiet()
    config = _parser().parse_args(list(arguments))
    check_counts(config, "passes", "window")
    paths = [config.checkpoint, *([] if config.compare is None else [config.compare])]
    checkpoints = [read_checkpoint(path) for path in paths]
    if not all(checkpoint.vocabulary.is_text for checkpoint in checkpoints):
        score_array(config, checkpoints, _names(paths))
        return
    with opened(config.input) as source:
        content = source.read()
    scored = []
    for checkpoint in checkpoints:
        module = load_model(checkpoint, config.allow).to(find_device(config.device))
        flow = resized_flow(module, checkpoint, config.passes, config.window)
        scored.append(score(flow, checkpoint.vocabulary, content, overlap=config.overlap))
    scored = _comparable(scored)
    names = _names(paths)
    title = "the standard input" if config.input == STANDARD else Path(config.input).name
    if config.format == "html":
        write(render_page(scored, names, title), config.output)
    elif config.format == "jsonl":
        write("".join(f"{json.dumps(one)}\n" for one in _objects(scored, names)), config.output)
    else:
        with console_of(config.output) as console:
            _print(scored, names, title, console)


def _comparable(scored: Sequence[Scored]) -> list[Scored]:
    """Returns scores of the characters that all models have classes for."""
    unknown = np.logical_or.reduce([np.isnan(one.bits) for one in scored])
    return [replace(one, bits=np.where(unknown, np.nan, one.bits)) for one in scored]


def _names(paths: Sequence[str]) -> list[str]:
    """Returns the shortest ends of two paths that tell them apart, or three parts of each."""
    parts = [[part for part in Path(path).parts if part != "/"] for path in paths]

    def ends(number: int) -> list[str]:
        return ["/".join(part[-number:]) for part in parts]

    longest = max(map(len, parts)) if len(parts) > 1 else 0
    apart = (ends(number) for number in range(1, longest + 1))
    return next((names for names in apart if len(set(names)) == len(names)), ends(3))


def _number(bits: float) -> float | str | None:
    """Returns bits as JSON has them: null for none, and a word for infinitely many."""
    if np.isnan(bits):
        return None
    return float(bits) if np.isfinite(bits) else "Infinity"


def _objects(scored: Sequence[Scored], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns an object for every line, by every model, and one for the whole."""
    found: list[dict[str, Any]] = []
    for one, name in zip(scored, names, strict=True):
        for line in one.lines():
            bits = one.bits[line.begin : line.end]
            found.append(
                {
                    "model": name,
                    "line": line.number,
                    "text": one.text[line.begin : line.end],
                    "bits": _number(line.bits),
                    "characters": line.scored,
                    "bits_per_character": _number(line.bits_per_character),
                    "perplexity": _number(line.perplexity),
                    "character_bits": [_number(bit) for bit in bits],
                }
            )
        places = [
            {
                "line": place.line,
                "column": place.column,
                "character": one.text[place.index],
                "bits": _number(place.bits),
                "likelier": dict(one.likelier_at(place.index)),
            }
            for place in one.places(WORST)
        ]
        found.append(
            {
                "model": name,
                "bits": _number(one.total),
                "characters": one.scored,
                "unknown": len(one.text) - one.scored,
                "bits_per_character": _number(one.bits_per_character),
                "perplexity": _number(one.perplexity),
                "places": places,
            }
        )
    return found


def _print(scored: Sequence[Scored], names: Sequence[str], title: str, console: Console) -> None:
    whole = Table(title=_visible(title), title_justify="left")
    for head in ("model", "bits", "characters", "no class", "bits each", "perplexity"):
        whole.add_column(head, justify="left" if head == "model" else "right")
    for one, name in zip(scored, names, strict=True):
        whole.add_row(
            _visible(name),
            f"{one.total:,.1f}",
            f"{one.scored:,}",
            f"{len(one.text) - one.scored:,}",
            f"{one.bits_per_character:.4f}",
            f"{one.perplexity:.3f}",
        )
    console.print(whole)
    _print_lines(scored, names, console)
    for one, name in zip(scored, names, strict=True):
        _print_places(one, name, console)
    for one, name in zip(scored, names, strict=True):
        if not one.exact_terms:
            said = ": the bits of a character are those of what the transforms leave at its place"
            console.print(_visible(name) + said + "; their sum is the text's")


def _print_lines(scored: Sequence[Scored], names: Sequence[str], console: Console) -> None:
    """Prints the lines that surprise one model most, or two most differently."""
    lines = [one.lines() for one in scored]
    if len(scored) == 1:
        title, order = "the most surprising lines", scored[0].surprising_lines(WORST)
    else:
        title = f"the lines that {names[1]} finds likelier than {names[0]}, and the other way round"
        gains = sorted(zip(*lines, strict=True), key=lambda pair: pair[1].bits - pair[0].bits)
        half = min(WORST // 2, -(-len(gains) // 2))
        order = [pair[0] for pair in (*gains[:half], *gains[half:][-half:])]
    table = Table(title=_visible(title), title_justify="left")
    table.add_column("line", justify="right")
    for name in names:
        for head in ("bits", "bits each", "perplexity"):
            by = "" if len(names) == 1 else f", {name}"
            table.add_column(_visible(head + by), justify="right")
    table.add_column("text", no_wrap=True, overflow="ellipsis")
    for line in order:
        cells = []
        for found in (every[line.number - 1] for every in lines):
            cells += [
                f"{found.bits:,.1f}",
                f"{found.bits_per_character:.2f}",
                f"{found.perplexity:.1f}",
            ]
        text = scored[0].text[line.begin : line.end].rstrip("\n")
        table.add_row(str(line.number), *cells, _visible(text))
    console.print(table)


def _print_places(scored: Scored, name: str, console: Console) -> None:
    table = Table(title=_visible(f"the most surprising places, {name}"), title_justify="left")
    for head in ("line", "column", "bits"):
        table.add_column(head, justify="right")
    for head in ("text", "likelier"):
        table.add_column(head)
    for place in scored.places(WORST):
        before = scored.text[max(0, place.index - AROUND) : place.index]
        after = scored.text[place.index + 1 : place.index + 1 + AROUND]
        here = _visible(scored.text[place.index])
        here.stylize("reverse")
        likelier = (
            f"{sign.replace(' ', '␣')} {prob:.0%}" for sign, prob in scored.likelier_at(place.index)
        )
        table.add_row(
            str(place.line),
            str(place.column),
            f"{place.bits:.1f}",
            _visible(before) + here + _visible(after),
            _visible("  ".join(likelier)),
        )
    console.print(table)


def _visible(text: str) -> Text:
    """Returns a text on one line, as it is but for what a terminal would obey."""
    signs = (sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text.replace("\n", "↵"))
    return Text("".join(signs))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: score_text(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
