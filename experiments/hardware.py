"""Does all that is asked of a GPU, within fifteen minutes and without a network.

    python -m experiments.hardware
    python -m experiments.hardware --smoke

In this order: the tests with the marker `device`; ``benchmarks/generation.py``, of systems over
lanes and of others; and five minutes each, evaluation included, of the Transformer over lanes and
of its autoregressive twin, on the King James text or that of an ``--overlay``. Each step is a
process with a time limit. A record is in its folder as soon as it is made, and a step that fails
stops no other. A smoke takes about a minute on a CPU.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from dflows.cli.configs import Parser
from dflows.cli.errors import run_command
from dflows.cli.noise import quiet
from dflows.cli.summary import stdout_console
from dflows.errors import UserError
from dflows.provenance import describe_device
from experiments.children import ROOT, environment
from experiments.overlays import merge_configs
from experiments.plan import PLANS, read_plan

__all__ = ["Step", "hardware", "main", "run_step", "steps"]

PLAN, TASK = "language-modelling-gpu", "king-james"

TEST_SECONDS, TRAIN_SECONDS = 100.0, 300.0

PASSES = ("", "-32", "-64", "-128")


class Timing(NamedTuple):
    """Seconds, options and systems of `benchmarks/generation.py`; what takes longest comes last."""

    seconds: float
    options: tuple[str, ...]
    systems: tuple[str, ...]


TIMINGS: Mapping[str, Timing] = {
    "generation over lanes": Timing(
        110.0,
        ("--length", "2048", "--opponent", "lstm-lanes", "--within", "60", "--no-roofline"),
        (
            *(f"lstm-lanes{passes}" for passes in PASSES),
            *(f"transformer-lanes{passes}" for passes in (*PASSES[1:], "")),
        ),
    ),
    "generation": Timing(
        60.0,
        ("--within", "40"),
        (
            *("transformer", "lstm", "levels-16-transformer", "levels-16", "few-pass-16"),
            *("coarse-to-fine", "bipartite-8", "both-directions"),
        ),
    ),
}
BRIEFLY = ("--repeats", "5", "--most-seconds", "2", "--naive-every", "96")

ROWS: Mapping[str, dict[str, Any]] = {
    "lanes-transformer": {
        "model": {"init_args": {"objective": {"init_args": {"passes": [8, 64]}}}}
    },
    "transformer": {},
}
"""The rows that are trained, and what the smoke of each adds to that of the plan."""


@dataclass(frozen=True)
class Step:
    """Creates a step: a process that has some seconds.

    Args:
        name: What the table calls it.
        seconds: How long it may take.
        arguments: Those of Python.
        folder: Where it runs; here by default.
    """

    name: str
    seconds: float
    arguments: Sequence[str] = field(repr=False)
    folder: Path | None = None


def steps(
    stack: ExitStack, results: Path, *, smoke: bool = False, overlay: str = ""
) -> Iterator[Step]:
    """Yields what is asked of a GPU, in its order.

    Args:
        stack: Holds the files that the steps read.
        results: Folder of all records.
        smoke: Whether to yield the short form of every step, on the CPU.
        overlay: Configuration merged over those of the training; none where it is empty.
    """
    # What a device warns of is no failure; other files have tests for CUDA alone.
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default")
    where = "tests/dflows/test_devices.py" if smoke else "tests/dflows"
    yield Step("tests", TEST_SECONDS, (*tests, "-m", "device and not slow", where), ROOT)
    ending = "-smoke" if smoke else ""
    record = ("--record", str(results / f"benchmarks{ending}"))
    for name, timing in TIMINGS.items():
        line = (str(ROOT / "benchmarks" / "generation.py"), *timing.options, *record)
        form = ("--smoke",) if smoke else ("--device", "cuda", *BRIEFLY)
        systems = timing.systems[:2] if smoke else timing.systems
        yield Step(name, timing.seconds, (*line, *form, "--systems", *systems))
    plan = read_plan(PLANS / f"{PLAN}.yaml")
    record = ("--record", str(results / f"{PLAN}{ending}"))
    for row, keys in ROWS.items():
        config = merge_configs([], [plan.smoke.config, keys]) if smoke else {}
        run = plan.run(row, TASK, plan.seeds[0], config)
        line = ("-m", "dflows.fit", *stack.enter_context(run.arguments()), *record)
        over = ("--config", overlay) if overlay else ()
        yield Step(f"training {row}", TRAIN_SECONDS, (*line, *over))


def run_step(step: Step) -> str:
    """Runs a step, which prints for itself.

    Returns:
        What went wrong, or an empty string.
    """
    process = subprocess.Popen(  # noqa: S603 - our own commands
        [sys.executable, *step.arguments],
        cwd=step.folder,
        env=environment(HF_HUB_OFFLINE="1"),
        start_new_session=True,
    )
    try:
        code = process.wait(timeout=step.seconds)
    except subprocess.TimeoutExpired:
        return f"over its {step.seconds:g} seconds"
    finally:
        if process.poll() is None:  # with the processes that it started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit code {code}" if code else ""


def hardware(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments.

    Raises:
        UserError: If there is no GPU and no smoke is asked for, or a step failed.
    """
    quiet()
    parser = Parser(prog="python -m experiments.hardware")
    parser.add_argument("--smoke", action="store_true", help="Run briefly, on the CPU.")
    parser.add_argument("--overlay", type=str, default="", help="Configuration of another text.")
    parser.add_argument("--results", type=str, default="results", help="Folder of all records.")
    given = parser.parse_args(list(arguments))
    if not (given.smoke or torch.cuda.is_available()):
        raise UserError("there is no GPU that PyTorch finds: go to a machine with one, or --smoke")
    console = stdout_console()
    table = Table("step", "seconds", "of", "outcome")
    failed = []
    with ExitStack() as stack:
        results = Path(given.results).resolve()
        for step in steps(stack, results, smoke=given.smoke, overlay=given.overlay):
            console.rule(step.name)
            begin = time.perf_counter()
            wrong = run_step(step)
            failed += [step.name] if wrong else []
            seconds = f"{time.perf_counter() - begin:.0f}"
            table.add_row(step.name, seconds, f"{step.seconds:.0f}", wrong or "passed")
    # Only now: it occupies the device.
    table.title = describe_device("cpu" if given.smoke else "cuda")
    console.print(table)
    if failed:
        raise UserError(f"{', '.join(failed)} failed: what was printed in these steps says why")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: hardware(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
