"""Drills: processes that run, fail or are stopped, and a check of what comes of it."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from experiments.children import environment
from experiments.faults import MOMENT

__all__ = ["ERRORS", "PATIENCE", "Drill", "Ended", "Start", "run_drill", "running", "said_once"]

PATIENCE = 300.0
"""Seconds after which a drill counts as hanging: far more than it takes, on a busy machine too."""

MARK = "DFLOWS_DRILL"
"""The environment variable that processes of a drill have from it, and hand on."""

PRINTED, ERRORS = "printed.txt", "errors.txt"
"""Files in the folder of a drill: the outputs of its processes."""


class Start(NamedTuple):
    """The arguments of Python in a process that a drill starts, and its environment."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = MappingProxyType({})


class Ended(NamedTuple):
    """What the processes of a drill left behind: exit codes, what they told, and a folder."""

    codes: list[int]
    printed: str
    errors: str
    folder: Path


@dataclass(frozen=True)
class Drill:
    """Creates a drill.

    Args:
        name: That of its record.
        happens: What goes wrong, for the table, which has one row for all drills of the same.
        promise: What is to come of it.
        starts: The processes to start.
        check: Yields what is not as promised.
        within: Seconds until no process is left: after what went wrong, or else the start.
    """

    name: str
    happens: str
    promise: str
    starts: Callable[[], list[Start]] = field(repr=False)
    check: Callable[[Ended], Iterator[str]] = field(repr=False)
    within: float


def said_once(ended: Ended, line: str) -> Iterator[str]:
    """Yields what is wrong, if the processes do not say one error, once, with this in it."""
    said = [entry for entry in ended.errors.splitlines() if entry.startswith("error")]
    if len(said) != 1 or line not in said[0]:
        yield f"said {said or 'nothing'}, and not once {line!r}"


def running(mark: str) -> list[int]:
    """Returns the processes that run and have a mark in their environment.

    Args:
        mark: The mark of a drill.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # that of another user, or gone
            if f"{MARK}={mark}".encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


def run_drill(drill: Drill, folder: Path) -> tuple[list[int], float, list[str]]:
    """Runs a drill.

    Args:
        drill: The drill.
        folder: An empty folder.

    Returns:
        The exit codes of the processes that it started; the seconds until none of them, nor any
        that they started, was left; and what was not as promised, however long it took.
    """
    mark = uuid.uuid4().hex
    variables = environment(OMP_NUM_THREADS="1", **{MARK: mark})
    begin = time.time()
    with ExitStack() as stack:
        outputs = [stack.enter_context((folder / name).open("w")) for name in (PRINTED, ERRORS)]
        processes = [
            subprocess.Popen(  # noqa: S603 - our own commands
                [sys.executable, *start.arguments],
                cwd=folder,
                env={**variables, **start.environment},
                stdout=outputs[0],
                stderr=outputs[1],
                start_new_session=True,
            )
            for start in drill.starts()
        ]
        while (left := running(mark)) and time.time() - begin < PATIENCE:
            for process in processes:
                process.poll()
            time.sleep(0.1)
        end = time.time()
        for number in left:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        codes = [process.wait() for process in processes]
    moment = folder / MOMENT
    seconds = end - (moment.stat().st_mtime if moment.is_file() else begin)
    if left:
        return codes, seconds, [f"{left} still ran after {PATIENCE:.0f} seconds"]
    printed, errors = ((folder / name).read_text(encoding="utf-8") for name in (PRINTED, ERRORS))
    return codes, seconds, list(drill.check(Ended(codes, printed, errors, folder)))
