"""What a finished run is judged by: the reports of its parts, in one table, and samples."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table

from dflows.cli.callbacks import Stopwatch
from dflows.reporting import Report, ReportsData
from lightning_modules import BaseModule

__all__ = [
    "EXACT_STATES",
    "end_processes",
    "generate_samples",
    "judge",
    "print_report",
    "print_samples",
    "stdout_console",
    "trainer_device",
]

EXACT_STATES = 10_000_000


def judge(
    module: BaseModule,
    data: object,
    splits: Iterable[str],
    stopwatch: Stopwatch,
    *,
    steps: int = 0,
    exact_states: int = EXACT_STATES,
) -> Report:
    """Collects the reports of a module and its data.

    Args:
        module: The module, which has scored the splits.
        data: What they are splits of; data that report nothing of themselves add nothing.
        splits: Splits, as `valid` and `test`.
        stopwatch: The clock of the run.
        steps: Optimizer steps.
        exact_states: The likelihood of a known distribution is summed over all states, where there
            are not more than these.

    Raises:
        CertificateError: If a likelihood lies below the entropy of the data, where that is known.
    """
    report, known = Report(), data if isinstance(data, ReportsData) else None
    for split in splits:
        report += module.report(split)
        if known is not None:
            report += known.report(module.scores[split])
    if known is not None:
        report += known.report_expected(module, exact_states)
    report += module.report_structure()
    tested = module.scores.get("test")
    report += stopwatch.report(
        steps, module.characters_read, None if tested is None else tested.characters
    )
    return report


def generate_samples(module: BaseModule, data: Any, seed: int, number: int = 4) -> list[str]:
    """Generates independent windows as text.

    Args:
        module: The module.
        data: What decodes them.
        seed: Seed of the draws.
        number: How many.
    """
    generator = torch.Generator(module.device).manual_seed(seed)
    context = module.example_contexts(number)
    given: dict[str, Any] = {} if context is None else {"context": context}
    samples = module.sample(number, generator=generator, **given)
    return [data.decode(row) for row in samples.cpu()]


def print_report(report: Report, console: Console, title: str) -> None:
    """Prints the rows of a report as a table."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in report.rows:
        table.add_row(*row)
    console.print(table)


def stdout_console() -> Console:
    """Returns a console that does not cut lines where there is no terminal."""
    columns = os.environ.get("COLUMNS")
    console = Console()
    if not console.is_terminal and not columns:
        console = Console(width=120)
    return console


def print_samples(console: Console, samples: Sequence[str]) -> None:
    """Prints independent windows of generated text."""
    console.rule("sample", align="left", style="dim")
    console.print("\n".join(samples), markup=False, highlight=False, soft_wrap=True)
    console.rule(style="dim")


def trainer_device(trainer: pl.Trainer) -> torch.device:
    """Returns the device of this process's model."""
    return trainer.strategy.root_device


def end_processes() -> None:
    """Ends the group of processes, so that what follows on the first disturbs none and is alone."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
