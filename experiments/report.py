"""Makes tables and figures from records: ``python -m experiments.report``.

The README gets the table of the text models, the pages in ``docs/experiments/`` those of
each experiment that has run and of the benchmarks and drills, and the guide its plan for several
devices. Nothing is measured here.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from dflows.cli.errors import run_command
from dflows.errors import UserError
from dflows.records import Record, read_records
from experiments.reports import (
    addition,
    archives,
    benchmarks,
    curves,
    drills,
    estimators,
    full_rank,
    language_modelling,
    mixture,
    potts,
    scaling,
)
from experiments.reports.experiment import Experiment, read_experiment
from experiments.reports.markdown import escaped, write_page
from experiments.reports.text import render_table

__all__ = ["DRAWERS", "PAGES", "RENDERERS", "main", "report"]

RENDERERS: Mapping[str, Callable[[Experiment], str]] = MappingProxyType(
    {
        "full-rank": full_rank.render,
        "estimators": estimators.render,
        "mixture": mixture.render,
        "addition": addition.render,
        "potts": potts.render,
        "language-modelling": language_modelling.render,
        "language-modelling-long": language_modelling.render,
        "language-modelling-gpu": language_modelling.render,
    }
)
"""The function that renders the tables of each experiment, by its name."""

PAGES: Mapping[str, tuple[str, Callable[[Sequence[Record]], str]]] = MappingProxyType(
    {
        "archives": ("guide/archives.md", archives.render),
        "benchmarks": ("experiments/benchmarks.md", benchmarks.render),
        "drills": ("experiments/drills.md", drills.render),
        "scaling": ("guide/scaling.md", scaling.render),
    }
)
"""The pages that are no experiment's, and the functions that render their tables, by folder."""

DRAWERS: Mapping[str, Callable[[Experiment, Path], None]] = MappingProxyType(
    {
        "estimators": estimators.draw,
        "mixture": mixture.draw,
        "language-modelling": curves.draw,
        "language-modelling-long": curves.draw,
        "language-modelling-gpu": curves.draw,
    }
)
"""The function that draws the figure of an experiment, where it has one."""


def report(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments.

    Raises:
        UserError: If records, a page or its marks are missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Make tables and figures from the records of finished runs.",
        exit_on_error=False,
    )
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise argparse.ArgumentError(None, f"unrecognized arguments: {' '.join(unknown)}")
    names = ("text", *RENDERERS, *PAGES)
    found = [name for name in names if (options.results / name).is_dir()]
    if not found:
        raise UserError(
            f"{options.results} holds no records: run python -m dflows.fit --record "
            f"{options.results}/text, or python -m experiments.reproduce, first"
        )
    for name in found:
        if name == "text":
            count = _text(options.results, options.readme)
            print(f"{options.readme} is made from {count} records")
            continue
        page = options.docs / "experiments" / f"{name}.md"
        if name in PAGES:
            path, render = PAGES[name]
            page = options.docs / path
            write_page(page, render(_records(options.results / name)))
        else:
            experiment = read_experiment(name, options.results)
            write_page(page, RENDERERS[name](experiment.escaped()))
            if name in DRAWERS:
                DRAWERS[name](experiment, options.docs / "figures" / f"{name}.svg")
        print(f"{page} is made from {options.results / name}")


def _records(folder: Path) -> list[Record]:
    return [escaped(record) for record in read_records(folder)]


def _text(results: Path, readme: Path) -> int:
    """Makes the README's table, and returns the number of records used."""
    records = _records(results / "text")
    if not records:
        raise UserError(f"{results / 'text'} holds no records: run python -m dflows.fit first")
    folder = results / "benchmarks"
    speeds = _records(folder) if folder.is_dir() else []
    rendered = render_table(records, speeds)
    write_page(readme, rendered)
    return len(records)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: report(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
