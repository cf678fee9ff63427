"""The nats of rows of integers, and of every column of them."""

import heapq
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from datamodules.matrices import Matrix, open_matrix
from dflows.cli.checkpoints import Checkpoint, load_model
from dflows.cli.models import find_device, resized_flow
from dflows.cli.streams import STANDARD, console_of, output
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.modules import device_of

__all__ = ["check_length", "score_array"]

AT_ONCE = 1 << 22
"""Probabilities that are computed together."""
WORST_ROWS, WORST_COLUMNS = 10, 3


def check_length(checkpoint: Checkpoint, length: int | None, window: int | None) -> None:
    """Refuses rows of other columns than a model was trained with.

    Args:
        checkpoint: The checkpoint of a model of rows.
        length: The columns that are asked for; fewer are the first of a row.
        window: Columns that are to be drawn together.

    Raises:
        UserError: If there are more columns than the model has, or they are to be cut.
    """
    for key, given, wrong in (
        ("length", length, (length or 0) > checkpoint.length),
        ("window", window, window not in (None, checkpoint.length)),
    ):
        if wrong:
            raise UserError(
                f"{key} is {given}, and the model in {checkpoint.path} is of rows of "
                f"{checkpoint.length} columns, and of no text of any length: leave {key} away"
            )


def score_array(config: Any, checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> None:
    """Runs ``python -m dflows.score`` on an array.

    Args:
        config: The arguments of the command.
        checkpoints: What is to score it.
        names: What they are called.

    Raises:
        UserError: If an argument makes no sense for rows, or a model cannot score them.
    """
    _check_arguments(config, checkpoints)
    matrix = open_matrix(config.input)
    scores = []
    for checkpoint in checkpoints:
        module = load_model(checkpoint, config.allow).to(find_device(config.device))
        flow = resized_flow(module, checkpoint, config.passes, None)
        _check_rows(flow, checkpoint, matrix)
        scores.append(partial(_scored, flow, matrix))
    if config.format == "jsonl":
        with output(config.output or STANDARD) as file:
            for name, score in zip(names, scores, strict=True):
                for found in _objects(score(), name, matrix.columns):
                    file.write(f"{json.dumps(found)}\n".encode())
        return
    tables = [
        table
        for name, score in zip(names, scores, strict=True)
        for table in _tables(score(), name, matrix)
    ]
    with console_of(config.output) as console:
        console.print(*tables)


def _check_arguments(config: Any, checkpoints: Sequence[Checkpoint]) -> None:
    text = next((found for found in checkpoints if found.vocabulary.is_text), None)
    if text is not None:
        raise UserError(
            f"{text.path} is a model of text, and the other one of rows: compare two of a kind"
        )
    if config.format == "html":
        raise UserError("a page is of a text, and these are rows: give --format table or jsonl")
    for key, given in (("overlap", config.overlap), ("window", config.window)):
        if given:
            raise UserError(f"{key} is {given}, and rows have no windows: leave {key} away")
    if config.input == STANDARD:
        raise UserError("rows are read from a file .npy or .npz: name it in place of -")


def _check_rows(flow: DiscreteFlow, checkpoint: Checkpoint, matrix: Matrix) -> None:
    """Refuses rows that a model cannot score."""
    if flow.takes_context:
        raise UserError(
            f"the model in {checkpoint.path} is conditional, and a row has no context to give it: "
            "use dflows.load(path).log_prob(rows, context) in Python"
        )
    if matrix.columns != checkpoint.length:
        raise UserError(
            f"{matrix.name} has {matrix.columns} columns, and the model in {checkpoint.path} has "
            f"{checkpoint.length}: give an array of as many"
        )
    matrix.largest(flow.num_classes)


class _Row(NamedTuple):
    """A row: its nats, its number from 0, its values (D,) and their nats (D,)."""

    total: float
    number: int
    values: NDArray[np.integer]
    nats: NDArray[np.float64]

    def worst_columns(self) -> str:
        """Returns the columns that cost most."""
        order = np.argsort(-self.nats, kind="stable")[:WORST_COLUMNS]
        return ", ".join(f"{n}: {self.values[n]} ({self.nats[n]:.1f})" for n in order.tolist())


@torch.no_grad()
def _scored(flow: DiscreteFlow, matrix: Matrix) -> Iterator[_Row]:
    """Yields the rows of an array with their scores, block by block."""
    size = max(1, AT_ONCE // (matrix.columns * flow.num_classes))
    for first, block in matrix.blocks():
        for begin in range(0, len(block), size):
            values = block[begin : begin + size]
            y = torch.from_numpy(values.astype(np.int64)).to(device_of(flow))
            terms = -flow.log_prob_terms(y).cpu().double().numpy()
            for place, (row, nats) in enumerate(zip(values, terms, strict=True)):
                yield _Row(float(nats.sum()), first + begin + place, row, nats)


def _summary(number: int, nats: float, columns: int) -> dict[str, Any]:
    """Returns the figures of so many rows."""
    return {
        "rows": number,
        "nats": _number(nats),
        "nats_per_row": _number(nats / number),
        "bits_per_column": _number(nats / number / columns / math.log(2)),
    }


def _objects(rows: Iterable[_Row], name: str, columns: int) -> Iterator[dict[str, Any]]:
    """Yields what JSON says of every row, and of the whole."""
    number, nats = 0, 0.0
    for row in rows:
        number, nats = number + 1, nats + row.total
        found = {"model": name, "row": row.number, "nats": _number(row.total)}
        yield {**found, "column_nats": [_number(value) for value in row.nats.tolist()]}
    yield {"model": name, **_summary(number, nats, columns)}


def _number(value: float) -> float | str:
    """Returns a number as JSON has it: a word for infinitely many."""
    return value if math.isfinite(value) else "Infinity"


def _tables(rows: Iterable[_Row], name: str, matrix: Matrix) -> list[Table]:
    """Returns a table of the whole, and one of the most surprising rows."""
    worst: list[tuple[float, int, _Row]] = []
    number, nats = 0, 0.0
    for row in rows:
        number, nats = number + 1, nats + row.total
        # The first of equal ones stays; a number says which, as arrays have no order.
        push = heapq.heappush if len(worst) < WORST_ROWS else heapq.heappushpop
        push(worst, (row.total, -row.number, row))
    found = _summary(number, nats, matrix.columns)
    whole = Table(title=Text(matrix.name), title_justify="left")
    whole.add_column("model")
    for head in ("rows", "nats a row", "bits a column"):
        whole.add_column(head, justify="right")
    cells = (f"{float(found[key]):.4f}" for key in ("nats_per_row", "bits_per_column"))
    whole.add_row(Text(name), f"{number:,}", *cells)
    table = Table(title=Text(f"the most surprising rows, {name}"), title_justify="left")
    for head in ("row", "nats"):
        table.add_column(head, justify="right")
    table.add_column("its columns that cost most: value (nats)")
    for _, _, row in sorted(worst, reverse=True):
        table.add_row(str(row.number), f"{row.total:.1f}", row.worst_columns())
    return [whole, table]
