"""Lets two processes run, fail and be stopped in every way, and sees that all end as promised.

    python -m experiments.drills
    python -m experiments.drills --only torchrun

Each drill is a run of two processes on the CPU, with a small flow on the King James text, started
by Lightning, by torchrun, or as two nodes, or with a part of the parameters in each process. In
some, one process or both meet an error or a signal, at a step, in a validation, or before the first
step. What came of it is told in a table, and recorded; ``python -m experiments.report`` puts it
into `docs/experiments/drills.md`. A drill is an entry of :data:`DRILLS`. It takes Linux: processes
are looked for in `/proc`.
"""

import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.table import Table

from dflows.cli.configs import Parser
from dflows.cli.errors import run_command
from dflows.cli.logs import LOG
from dflows.cli.noise import quiet
from dflows.cli.summary import stdout_console
from dflows.errors import UserError
from dflows.provenance import describe_device
from dflows.records import Record, read_record, write_record
from experiments.drilling import ERRORS, PATIENCE, Drill, Ended, Start, run_drill, said_once

__all__ = ["DRILLS", "LAUNCHERS", "drills", "fit", "main"]

SMALL = (
    *("--config", "smoke/strided.yaml", "--data.max_eval_characters", "2048"),
    *("--data.eval_batch_size", "8", "--progress_bar.refresh_rate", "0"),
)
STEP, BATCH = 6, 3
VALIDATED = 4


def fit(*arguments: object) -> list[str]:
    """Returns the arguments of Python for a small run."""
    return ["-m", "dflows.fit", *SMALL, *map(str, arguments)]


def _lightning(*arguments: object) -> list[Start]:
    return [Start(fit("--trainer.devices", 2, "--trainer.strategy", "ddp", *arguments))]


def _sharded(*arguments: object) -> list[Start]:
    return [Start(fit("--trainer.devices", 2, "--trainer.strategy", "fsdp", *arguments))]


def _torchrun(*arguments: object) -> list[Start]:
    options = ("--nproc-per-node", "2", "--standalone")
    return [Start(["-m", "torch.distributed.run", *options, *fit(*arguments)])]


def _two_nodes(*arguments: object) -> list[Start]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    line = fit("--trainer.devices", 1, "--trainer.num_nodes", 2, *arguments)
    return [Start(line, {**place, "NODE_RANK": str(node)}) for node in (0, 1)]


LAUNCHERS: dict[str, Callable[..., list[Start]]] = {
    "lightning": _lightning,
    "torchrun": _torchrun,
    "nodes": _two_nodes,
    "fsdp": _sharded,
}
"""How two processes are started, and what they share."""


CODES = {"raised": 1, "killed": 1, "terminated": 143, "interrupted": 130}
RESUMES = ": --ckpt_path runs/strided/version_0/last.ckpt resumes it"
LINES = {
    "raised": "RuntimeError: the loader broke",
    "killed": "another process is gone",
    "terminated": f"terminated{RESUMES}",
    "interrupted": f"interrupted{RESUMES}",
}
HAPPENS = {
    "raised": "an error",
    "killed": "kill -9",
    "terminated": "SIGTERM",
    "interrupted": "SIGINT",
}
PLACES = {"setup": "before the first step", "train": "in training", "valid": "in a validation"}


def _fault(what: str, rank: int, place: str, launcher: str) -> Drill:
    number = {"setup": 0, "train": STEP, "valid": BATCH}[place]
    stops = what in ("terminated", "interrupted")

    def starts() -> list[Start]:
        arguments = ["--trainer.max_steps", 100_000, "--trainer.val_check_interval", VALIDATED]
        arguments += ["--trainer.callbacks", "experiments.faults.Fault"]
        settings = {"what": what, "rank": rank, "place": place, "number": number}
        for key, value in settings.items():
            arguments += [f"--trainer.callbacks.{key}", value]
        return LAUNCHERS[launcher](*arguments)

    def check(ended: Ended) -> Iterator[str]:
        codes = [CODES[what]] * len(ended.codes)
        if what == "killed" and rank < len(codes):
            codes[rank] = -signal.SIGKILL
        # That of torchrun is its own, whatever those of the processes were.
        if ended.codes != codes and not (launcher == "torchrun" and all(ended.codes)):
            yield f"exit codes {ended.codes}, not {codes}"
        yield from said_once(ended, LINES[what])
        # A process that stops alone writes no checkpoint: the last is that of the validation.
        here = {"train": STEP if stops else VALIDATED, "valid": VALIDATED if stops else None}
        wanted = [here[place]] if here.get(place) else []
        if (saved := _saved(ended.folder)) != wanted:
            yield f"last checkpoints of the steps {saved}, not {wanted}"

    who = "both processes" if rank < 0 else "one process"
    return Drill(
        name="-".join((launcher, what, place, str(rank) if rank >= 0 else "both")),
        happens=f"{HAPPENS[what]} {PLACES[place]}, {who}",
        promise="all save one checkpoint and end" if stops else "one line, and all end",
        starts=starts,
        check=check,
        within=10.0 if what == "terminated" else 30.0,
    )


def _saved(folder: Path) -> list[int]:
    """Returns the steps of the last checkpoints of all runs in a folder."""
    found = folder.glob("runs/*/version_*/last.ckpt")
    return [torch.load(path, weights_only=True)["global_step"] for path in found]


def _whole(name: str, how: str, starts: Callable[..., list[Start]], *arguments: object) -> Drill:
    def check(ended: Ended) -> Iterator[str]:
        if any(ended.codes):
            yield f"exit codes {ended.codes}, not 0"
        told = {
            "summary": ended.printed.count("test, bits per character"),
            "sample": ended.printed.count("sample ─"),
            "record": ended.printed.count("record: "),
            "environment": ended.errors.count("2 processes on "),
            "validation after the last step": ended.errors.count(f"validation after step {STEP},"),
        }
        yield from (
            f"the {what} is told {number} times" for what, number in told.items() if number != 1
        )
        runs = [*ended.folder.glob("runs/*/version_*")]
        if len(runs) != 1:
            yield f"{len(runs)} runs, not one"
        for path in ended.folder.glob("runs/*/version_*/strided-0.json"):
            record = read_record(path)
            if record.metrics["steps"] != STEP or not record.device.startswith("2 x "):
                yield f"{record.metrics['steps']} steps on {record.device}"

    steps = ("--trainer.max_steps", STEP, "--trainer.val_check_interval", VALIDATED)
    return Drill(
        name=f"whole-{name}",
        happens=f"nothing: {how}",
        promise="one run, told once",
        starts=lambda: starts(*steps, *arguments),
        check=check,
        within=PATIENCE,
    )


def _refused(name: str, happens: str, line: str, *arguments: object) -> Drill:
    def check(ended: Ended) -> Iterator[str]:
        if ended.codes != [1]:
            yield f"exit codes {ended.codes}, not [1]"
        yield from said_once(ended, line)
        if left := [path.name for path in ended.folder.glob("runs")]:
            yield f"left {left}"

    return Drill(
        name=f"refused-{name}",
        happens=happens,
        promise="refused in one line",
        starts=lambda: [Start(fit(*arguments))],
        check=check,
        within=PATIENCE,
    )


DRILLS: Sequence[Drill] = (
    *(
        _fault(what, rank, place, launcher)
        for what in CODES
        for place in PLACES
        for launcher in LAUNCHERS
        for rank in (0, 1, -1)
        # A process that kills itself and others leaves nobody to tell.
        if (what, rank) != ("killed", -1) and (place != "setup" or what == "raised")
    ),
    _whole("lightning", "Lightning's launcher", _lightning),
    _whole("torchrun", "torchrun without trainer.devices", _torchrun),
    _whole("nodes", "two nodes, a launcher each", _two_nodes),
    _whole(
        "unused",
        "ddp_find_unused_parameters_true",
        _torchrun,
        *("--trainer.strategy", "ddp_find_unused_parameters_true"),
    ),
    _whole("fsdp", "fsdp", _sharded),
    *(
        _refused(
            strategy,
            f"trainer.strategy {strategy}",
            f"trainer.strategy is {strategy}, by which dflows does not train: give {instead}",
            *("--trainer.devices", 2, "--trainer.strategy", strategy),
        )
        for strategy, instead in (
            ("deepspeed", "fsdp"),
            ("deepspeed_stage_3_offload", "fsdp"),
            ("fsdp_cpu_offload", "fsdp"),
            ("xla", "ddp"),
            ("colossalai", "ddp"),
        )
    ),
    *(
        _refused(
            strategy,
            f"trainer.strategy {strategy}",
            "trainer.strategy spawns or forks its processes",
            *("--trainer.devices", 2, "--trainer.strategy", strategy),
        )
        for strategy in ("ddp_spawn", "ddp_fork", "ddp_notebook")
    ),
    _refused("devices", "trainer.devices 99", "trainer.devices is 99", "--trainer.devices", 99),
)
"""All drills, in the order in which they are run."""


def drills(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments.

    Raises:
        UserError: If a drill did not end as promised.
    """
    quiet()
    parser = Parser(prog="python -m experiments.drills")
    parser.add_argument("--only", type=str, default="", help="Those with this in their name.")
    parser.add_argument("--record", type=str, default="results/drills", help="Folder of records.")
    given = parser.parse_args(list(arguments))
    chosen = [drill for drill in DRILLS if given.only in drill.name]
    if not chosen:
        raise UserError(
            f"--only is {given.only}, and no drill has that in its name: there are "
            f"{', '.join(drill.name for drill in DRILLS)}"
        )
    table = Table("drill", "exit codes", "seconds", "of", "outcome")
    failed = []
    for number, drill in enumerate(chosen, start=1):
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="dflows-drill-") as folder:
            codes, seconds, wrong = run_drill(drill, Path(folder))
            if wrong:
                print(Path(folder, ERRORS).read_text(encoding="utf-8"), file=sys.stderr)
        if seconds > drill.within:
            wrong.append("too late")
        outcome = "; ".join(wrong) or "as promised"
        row = (drill.name, " ".join(map(str, codes)), f"{seconds:.1f}", f"{drill.within:.0f}")
        LOG.info("%d of %d, %s: %s", number, len(chosen), drill.name, outcome)
        table.add_row(*row, outcome)
        record = _record(drill, codes, seconds, time.perf_counter() - begin)
        if wrong:
            failed.append(drill.name)
            (Path(given.record) / record.file_name).unlink(missing_ok=True)
        else:
            write_record(given.record, record)
    stdout_console().print(table)
    if failed:
        raise UserError(f"{', '.join(failed)} did not end as promised: the table says how")


def _record(drill: Drill, codes: Sequence[int], ended: float, took: float) -> Record:
    return Record(
        name=drill.name,
        kind="drill",
        config={
            "number": DRILLS.index(drill),
            "happens": drill.happens,
            "promise": drill.promise,
            "within": drill.within,
        },
        seed=0,
        device=describe_device("cpu", 2),
        precision="32-true",
        seconds=took,
        parameters=0,
        metrics={"exit_codes": list(codes), "seconds_to_end": ended},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: drills(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
