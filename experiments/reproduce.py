"""Runs an experiment of the paper, and finds exact answers.

    python -m experiments.reproduce full-rank
    python -m experiments.reproduce full-rank --smoke

An experiment is a grid of runs of ``python -m dflows.fit``: its plan, in ``experiments/plans/``,
says which configurations each merges, and ``--overlay`` merges one over them all, for example the
path of a local text. A run that has a record is not repeated, so an interrupted experiment goes on;
with ``--resume`` the interrupted run itself goes on from its last checkpoint. Add ``--again`` after
changing a plan or its configurations. ``python -m experiments.report`` makes tables and figures of
the records.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console

from dflows.cli.configs import Parser
from dflows.cli.errors import run_command
from dflows.cli.fitting import fit
from dflows.cli.noise import quiet
from dflows.cli.summary import stdout_console
from dflows.errors import UserError
from dflows.records import read_record
from experiments.gradients import write_gradients
from experiments.overlays import config_diff, merge_configs
from experiments.plan import PLANS, Plan, Run, gradients_name, read_plan, reference_name
from experiments.references import reference_settings, task_data, write_reference

__all__ = ["EXPERIMENTS", "main", "reproduce"]

EXPERIMENTS = (
    "full-rank",
    "estimators",
    "mixture",
    "addition",
    "potts",
    "language-modelling",
    "language-modelling-long",
    "language-modelling-gpu",
)


@dataclass(frozen=True)
class Options:
    """Creates the options of the command.

    Args:
        smoke: Whether to run only the part that takes a minute.
        again: Whether to repeat runs that have a record.
        resume: Whether a run goes on from the last checkpoint of one that was interrupted.
        only: Pattern of the names of runs, with or without their seeds.
        results: Folder of all records.
        overlay: Configuration merged over those of every run, reference and comparison; none where
            it is empty.
    """

    smoke: bool
    again: bool
    resume: bool
    only: str
    results: Path
    overlay: str


def _parser() -> Parser:
    parser = Parser(prog="python -m experiments.reproduce")
    parser.add_argument("name", help=f"Experiment: {', '.join(EXPERIMENTS)}.")
    parser.add_argument("--smoke", action="store_true", help="Run the part that takes a minute.")
    parser.add_argument("--again", action="store_true", help="Repeat runs that have a record.")
    parser.add_argument(
        "--resume", action="store_true", help="Go on from last checkpoints of interrupted runs."
    )
    parser.add_argument(
        "--only",
        type=str,
        default="*",
        help="Pattern of the runs, for example '*rank*-5x5', or '*rank*-5x5-0' for one seed.",
    )
    parser.add_argument(
        "--overlay", type=str, default="", help="Configuration merged over all others."
    )
    parser.add_argument("--results", type=str, default="results", help="Folder of all records.")
    return parser


def _references(plan: Plan, options: Options, folder: Path, console: Console) -> int:
    """Finds the tabular references that have no record, and counts all that are asked for."""
    wanted = 0
    over = _overlay(options)
    for task, keys in plan.tasks.items():
        if options.smoke and task not in plan.smoke.tasks:
            continue
        data = None
        for name, reference in plan.references.items():
            record = reference_name(name, task)
            used = {plan.rows[row].reference for row in plan.smoke.rows}
            if (
                (reference.tasks is not None and task not in reference.tasks)
                or not fnmatchcase(record, options.only)
                or (options.smoke and name not in used)
            ):
                continue
            wanted += 1
            config = merge_configs(plan.configs, [keys, over])
            data = data or task_data(config)
            settings = reference_settings(plan, name, task, data.num_classes, config["data"])
            if _kept(folder / f"{record}-0.json", options, console, settings):
                continue
            with console.status(f"{plan.title}: best tabular flow {name} on {task}"):
                file = write_reference(plan, name, task, data, config["data"], folder)
            console.print(f"reference: {file}", highlight=False)
    return wanted


def _gradients(plan: Plan, options: Options, folder: Path, console: Console) -> int:
    """Compares the gradients that have no record, and counts all that are asked for."""
    if plan.gradients is None:
        return 0
    count, over = 0, _overlay(options)
    wanted = plan.gradients.rows or [*plan.rows]
    if options.smoke:
        wanted = [row for row in wanted if row in plan.smoke.rows]
    for task in plan.gradients.tasks:
        if options.smoke and task not in plan.smoke.tasks:
            continue
        asked = [row for row in wanted if fnmatchcase(gradients_name(row, task), options.only)]
        count += len(asked)
        rows = [
            row
            for row in asked
            if not _kept(folder / f"{gradients_name(row, task)}-0.json", options, console)
        ]
        if rows:
            console.rule(f"{plan.title}: gradients on {task}")
            for file in write_gradients(plan, task, rows, folder, over):
                console.print(f"gradients: {file}", highlight=False)
    return count


def _overlay(options: Options) -> dict[str, Any]:
    return merge_configs([options.overlay] if options.overlay else [], [])


def _last_checkpoint(run: Run) -> list[str]:
    """Returns the arguments that go on from the newest last checkpoint of a run, if it has one."""
    found = Path("runs", run.name).glob("version_*/last.ckpt")
    newest = max(found, key=lambda file: file.stat().st_mtime, default=None)
    return [] if newest is None else ["--ckpt_path", str(newest)]


def _asked(run: Run, options: Options) -> bool:
    names = (run.name, f"{run.name}-{run.seed}")
    return any(fnmatchcase(name, options.only) for name in names)


def _kept(
    file: Path, options: Options, console: Console, wanted: Mapping[str, Any] | None = None
) -> bool:
    """Says whether a record is kept, and prints the keys in which it differs from those wanted."""
    if options.again or not file.is_file():
        return False
    console.print(f"kept: {file}; --again repeats it", highlight=False)
    keys = [] if wanted is None else [*config_diff(read_record(file).config, wanted)]
    if keys:
        console.print(f"its configuration is not the plan's in {', '.join(keys)}", style="yellow")
    return True


def reproduce(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments.

    Raises:
        UserError: If there is no such experiment, or nothing of it is asked for.
    """
    quiet()
    given = _parser().parse_args(list(arguments))
    if given.name not in EXPERIMENTS:
        raise UserError(f"no experiment {given.name}: give one of {', '.join(EXPERIMENTS)}")
    results = Path(given.results)
    options = Options(given.smoke, given.again, given.resume, given.only, results, given.overlay)
    # A smoke run is no finished run, and its record must not stand for one.
    folder = options.results / (f"{given.name}-smoke" if options.smoke else given.name)
    console = stdout_console()
    plan = read_plan(PLANS / f"{given.name}.yaml")
    runs = [run for run in plan.runs(smoke=options.smoke) if _asked(run, options)]
    found = _references(plan, options, folder, console)
    for number, run in enumerate(runs, 1):
        if _kept(folder / f"{run.name}-{run.seed}.json", options, console, run.keys):
            continue
        console.rule(f"{plan.title}: {run.name}, seed {run.seed}, {number} of {len(runs)}")
        with run.arguments() as line:
            over = ["--config", options.overlay] if options.overlay else []
            last = _last_checkpoint(run) if options.resume else []
            fit([*line, *over, *last, "--record", str(folder)])
    found += len(runs) + _gradients(plan, options, folder, console)
    if not found:
        raise UserError(f"nothing of {given.name} matches {options.only}: leave --only away")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: reproduce(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
