"""Scores a text with a checkpoint, character by character.

    python -m dflows.score --checkpoint runs/lstm/version_0 letter.txt
    python -m dflows.score --checkpoint runs/lstm/version_0 letter.txt --format html -o letter.html

It prints the bits of the whole, the lines and the places that surprise the model most. As JSON
lines (``--format jsonl``) there is an object for every line and one for the whole. As a page
(``--format html``) each character has the colour of its bits, and shows what was held likelier.
With ``--compare``, another checkpoint scores the same text, for a comparison.

A text is cut into windows, as `python -m dflows.evaluate` cuts it; a model that reads from left to
right can be given the end of the window before: ``--overlap 64``. `-` is the standard input.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from dflows.cli.checkpoints import add_checkpoint_arguments, load_model, read_checkpoint
from dflows.cli.coding import STANDARD, exact_flow, find_device, opened
from dflows.cli.configs import Parser
from dflows.cli.errors import run_command
from dflows.cli.noise import quiet
from dflows.cli.page import render_page
from dflows.cli.scoring import Scored, score
from dflows.cli.summary import stdout_console
from dflows.errors import UserError
from dflows.files import write_text

__all__ = ["main", "score_text"]

WORST = 10
AROUND = 20


def _parser() -> Parser:
    parser = Parser(prog="python -m dflows.score")
    add_checkpoint_arguments(parser)
    parser.add_argument("input", type=str, help="The text, in UTF-8; - is the standard input.")
    parser.add_argument(
        "--compare", type=str | None, default=None, help="Another checkpoint, for a comparison."
    )
    parser.add_argument("--format", type=Literal["table", "jsonl", "html"], default="table")
    parser.add_argument(
        "-o", "--output", type=str | None, default=None, help="A file; the standard output."
    )
    parser.add_argument(
        "--passes", type=int | None, default=None, help="Passes of the model; its own."
    )
    parser.add_argument(
        "--window", type=int | None, default=None, help="Characters of a window; the model's."
    )
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
    for key in ("passes", "window"):
        if config[key] is not None and config[key] < 1:
            raise UserError(f"{key} is {config[key]}: give at least 1")
    paths = [config.checkpoint, *([] if config.compare is None else [config.compare])]
    checkpoints = [read_checkpoint(path) for path in paths]
    with opened(config.input) as source:
        content = source.read()
    scored = []
    for checkpoint in checkpoints:
        module = load_model(checkpoint, config.allow).to(find_device(config.device))
        exact_flow(module)
        module.resize(passes=config.passes, length=config.window)
        one = score(exact_flow(module), checkpoint.vocabulary, content, overlap=config.overlap)
        scored.append(one)
    if any(one.text != scored[0].text for one in scored):
        raise UserError("the two models read the text as other symbols: compare two of characters")
    names = _names(paths)
    title = "the standard input" if config.input == STANDARD else Path(config.input).name
    if config.format == "html":
        _write(render_page(scored, names, title), config.output)
    elif config.format == "jsonl":
        _write("".join(f"{json.dumps(one)}\n" for one in _objects(scored, names)), config.output)
    elif config.output is None:
        _print(scored, names, title, stdout_console())
    else:
        console = Console(width=120, record=True, quiet=True)
        _print(scored, names, title, console)
        _write(console.export_text(), config.output)


def _names(paths: Sequence[str]) -> list[str]:
    """Returns the shortest ends of paths that tell them apart."""
    parts = [[part for part in Path(path).parts if part != "/"] for path in paths]
    for number in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-number:]) for part in parts]
        if len(set(names)) == len(names) and (number > 2 or len(names) > 1):
            return names
    return ["/".join(part[-3:]) for part in parts]


def _write(text: str, output: str | None) -> None:
    if output in (None, STANDARD):
        print(text, end="")
    else:
        write_text(Path(str(output)).expanduser(), text)


def _objects(scored: Sequence[Scored], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns an object for every line, by every model, and one for the whole."""
    found = []
    for one, name in zip(scored, names, strict=True):
        for line in one.lines():
            bits = one.bits[line.begin : line.end]
            found.append(
                {
                    "model": name,
                    "line": line.number,
                    "text": one.text[line.begin : line.end],
                    "bits": line.bits,
                    "characters": line.scored,
                    "bits_per_character": line.bits_per_character,
                    "perplexity": line.perplexity,
                    "character_bits": [None if np.isnan(bit) else float(bit) for bit in bits],
                }
            )
        found.append(
            {
                "model": name,
                "bits": one.total,
                "characters": one.scored,
                "unknown": len(one.text) - one.scored,
                "bits_per_character": one.bits_per_character,
                "perplexity": one.perplexity,
            }
        )
    return found


def _print(scored: Sequence[Scored], names: Sequence[str], title: str, console: Console) -> None:
    whole = Table(title=title, title_justify="left")
    for name in ("model", "bits", "characters", "no class", "bits each", "perplexity"):
        whole.add_column(name, justify="left" if name == "model" else "right")
    for one, name in zip(scored, names, strict=True):
        whole.add_row(
            name,
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
    if not scored[0].exact_terms:
        console.print(
            "the bits of a character are those of what the transforms leave at its place; only "
            "their sum is the text's"
        )


def _print_lines(scored: Sequence[Scored], names: Sequence[str], console: Console) -> None:
    """Prints the lines that surprise one model most, or two most differently."""
    lines = [one.lines() for one in scored]
    if len(scored) == 1:
        title, order = "the most surprising lines", scored[0].surprising_lines(WORST)
    else:
        title = f"the lines that {names[1]} finds likelier than {names[0]}, and the other way round"
        gains = sorted(zip(*lines, strict=True), key=lambda pair: pair[1].bits - pair[0].bits)
        half = WORST // 2
        order = [pair[0] for pair in (*gains[:half], *gains[half:][-half:])]
    table = Table(title=title, title_justify="left")
    table.add_column("line", justify="right")
    for name in names:
        table.add_column("bits" if len(names) == 1 else f"bits, {name}", justify="right")
    for name in ("bits each", "perplexity"):
        table.add_column(name, justify="right")
    table.add_column("text", no_wrap=True, overflow="ellipsis")
    for line in order:
        own = [f"{found[line.number - 1].bits:,.1f}" for found in lines]
        text = scored[0].text[line.begin : line.end]
        each = f"{line.bits_per_character:.2f}", f"{line.perplexity:.1f}"
        table.add_row(str(line.number), *own, *each, _visible(text.rstrip("\n")))
    console.print(table)


def _print_places(scored: Scored, name: str, console: Console) -> None:
    table = Table(title=f"the most surprising places, {name}", title_justify="left")
    for head, side in (("line", "right"), ("column", "right"), ("bits", "right")):
        table.add_column(head, justify=side)  # type: ignore[arg-type]
    for head in ("text", "likelier"):
        table.add_column(head)
    for place in scored.places(WORST):
        before = scored.text[max(0, place.index - AROUND) : place.index]
        after = scored.text[place.index + 1 : place.index + 1 + AROUND]
        here = scored.text[place.index]
        likelier = scored.likelier_at(place.index)
        table.add_row(
            str(place.line),
            str(place.column),
            f"{place.bits:.1f}",
            f"{_visible(before)}[reverse]{_visible(here)}[/reverse]{_visible(after)}",
            "  ".join(f"{_visible(sign.replace(' ', '␣'))} {prob:.0%}" for sign, prob in likelier),
        )
    console.print(table)


def _visible(text: str) -> str:
    """Returns a text on one line, without what a terminal or Rich would obey."""
    signs = {"\n": "↵", "\\": "\\\\", "[": "\\["}
    return "".join(
        signs.get(sign, sign if sign.isprintable() else ascii(sign)[1:-1]) for sign in text
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: score_text(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
