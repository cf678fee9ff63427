"""The plan of an experiment: tasks, rows and seeds, read from a YAML file.

A run is a row of the experiment's table on one of its tasks with one seed. All that a run adds to
``python -m dflows.fit`` is the list of configurations that it merges: those of the experiment, the
row and the task.
"""

import copy
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from dflows.bijections import Bijection
from dflows.errors import UserError
from dflows.orderings import Ordering
from experiments.overlays import merge_configs

__all__ = [
    "PLANS",
    "Gradients",
    "Plan",
    "Published",
    "Reference",
    "Row",
    "Run",
    "Smoke",
    "gradients_name",
    "read_plan",
    "reference_name",
]

PLANS = Path(__file__).parent / "plans"
"""The folder of the plans, one YAML file an experiment."""

CONFIGS = Path(__file__).parent / "configs"
"""The folder of the configurations that only experiments use."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*(-[A-Za-z0-9._]+)*")


def gradients_name(row: str, task: str) -> str:
    """Returns the name of the record of a row's gradients on a task."""
    return f"gradients-{row}-{task}"


def reference_name(name: str, task: str) -> str:
    """Returns the name of the record of a reference on a task."""
    return f"reference-{name}-{task}"


@dataclass
class Reference:
    """Creates the description of a best tabular flow.

    Args:
        orderings: Orderings of its transforms, base → data.
        bijection: Called with K.
        base: Ordering of an autoregressive base; the factorized base without one.
        restarts: Ascents after the first.
        sweeps: The most sweeps of an ascent.
        greedy: Tasks without an ascent, to save time: transforms are fitted layerwise.
        tasks: Tasks that it is found for; all by default.
    """

    orderings: list[Ordering]
    bijection: Callable[[int], Bijection]
    base: Ordering | None = None
    restarts: int = 1
    sweeps: int = 40
    greedy: list[str] = field(default_factory=list)
    tasks: list[str] | None = None


@dataclass
class Row:
    """Creates the description of a row of an experiment's table.

    Args:
        label: Its label in the table.
        configs: Configurations merged over those of the experiment.
        config: Keys merged over them.
        reference: Name of its tabular reference.
        published: Published figures, by task.
        published_seconds: Published seconds of generating one example, by task.
        tasks: Tasks that it is run on; all by default.
        seeds: Seeds that it is run with; those of the experiment by default.
    """

    label: str
    configs: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    published: dict[str, float] = field(default_factory=dict)
    published_seconds: dict[str, float] = field(default_factory=dict)
    tasks: list[str] | None = None
    seeds: list[int] | None = None


@dataclass
class Published:
    """Creates a published point of an experiment's figure.

    Args:
        label: System and source.
        bpc: Bits per character.
        passes: Network evaluations one after the other.
        seconds: Seconds to generate a sequence, of its own length and on its own hardware.
    """

    label: str
    bpc: float
    passes: int | None = None
    seconds: float | None = None


@dataclass
class Goal:
    """Creates a goal that was set before the runs, for the table of what was reached.

    Args:
        row: The row that it is set for.
        at_most: Bits per character of test.
        passes: The number of passes; by default that which the row is tested with.
        above: The row whose bits are taken away first, where the goal is a distance.
    """

    row: str
    at_most: float
    passes: int | None = None
    above: str | None = None


@dataclass
class Gradients:
    """Creates the description of a comparison of gradients, at the same networks for all rows.

    Args:
        trained_by: The row whose run trains the networks.
        tasks: Tasks that gradients are compared on; nothing else is run on them.
        rows: Rows whose rules and objectives are compared; all by default.
        config: Keys merged over those of the row: how long the networks are trained.
        num_samples: Samples that the mean of a stochastic gradient is taken over.
        batches: Batches that the variance is taken over.
        batch_size: Examples of such a batch.
    """

    trained_by: str
    tasks: list[str]
    rows: list[str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 64
    batches: int = 64
    batch_size: int = 256


@dataclass
class Smoke:
    """Creates the part of an experiment that runs within a minute.

    Args:
        tasks: Its tasks.
        rows: Its rows.
        config: Keys merged over all others.
    """

    tasks: list[str]
    rows: list[str]
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Creates a run: one row on one task with one seed.

    Args:
        row: Name of the row.
        task: Name of the task.
        seed: The seed.
        configs: Configurations; a later one wins.
        overlays: Keys that win over them; a later mapping wins.
    """

    row: str
    task: str
    seed: int
    configs: tuple[str, ...]
    overlays: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        """The name of its record."""
        return f"{self.row}-{self.task}"

    @property
    def keys(self) -> dict[str, Any]:
        """All keys that it sets, nested."""
        named = {"seed_everything": self.seed, "name": self.name}
        return merge_configs(self.configs, [*self.overlays, named])

    @contextmanager
    def arguments(self) -> Iterator[list[str]]:
        """Yields the arguments of its `python -m dflows.fit`, whose files exist meanwhile."""
        with tempfile.TemporaryDirectory() as place:
            line = [part for config in self.configs for part in ("--config", config)]
            for number, overlay in enumerate(self.overlays):
                file = Path(place) / f"overlay{number}.yaml"
                file.write_text(yaml.safe_dump(overlay), encoding="utf-8")
                line += ["--config", str(file)]
            yield [*line, "--seed_everything", str(self.seed), "--name", self.name]


@dataclass
class Plan:
    """Creates the plan of an experiment.

    Args:
        title: Its title.
        tasks: The keys of each task, by its name.
        rows: The rows of its table, by their names.
        smoke: The part that runs within a minute.
        configs: Configurations beneath all others.
        references: Best tabular flows, by their names.
        gradients: How the gradients of the rows are compared, if they are.
        seeds: Seeds, each with a run of its own.
        figure: Rows that its figure shows; all by default.
        published: Published points of the figure, by task.
        goals: Goals of the rows, by task.

    Raises:
        UserError: If a name is not fit for a record, or refers to nothing.
    """

    title: str
    tasks: dict[str, dict[str, Any]]
    rows: dict[str, Row]
    smoke: Smoke
    configs: list[str] = field(default_factory=list)
    references: dict[str, Reference] = field(default_factory=dict)
    gradients: Gradients | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    figure: list[str] = field(default_factory=list)
    published: dict[str, list[Published]] = field(default_factory=dict)
    goals: dict[str, list[Goal]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.tasks, *self.rows, *self.references):
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"{name!r} cannot name a part of an experiment: use letters, digits, dots, "
                    "dashes and underscores, as in the name of a record"
                )
        lists: list[tuple[str, list[str], Mapping[str, Any]]] = []
        lists.append(("smoke.tasks", self.smoke.tasks, self.tasks))
        lists.append(("smoke.rows", self.smoke.rows, self.rows))
        lists.append(("figure", self.figure, self.rows))
        lists.append(("published", [*self.published], self.tasks))
        lists.append(("goals", [*self.goals], self.tasks))
        for task, goals in self.goals.items():
            wanted = [row for goal in goals for row in (goal.row, goal.above) if row is not None]
            lists.append((f"goals.{task}", wanted, self.rows))
        for name, row in self.rows.items():
            lists.append((f"rows.{name}.tasks", row.tasks or [], self.tasks))
            lists.append((f"rows.{name}.published", [*row.published], self.tasks))
            seconds = [*row.published_seconds]
            lists.append((f"rows.{name}.published_seconds", seconds, self.tasks))
            named = [] if row.reference is None else [row.reference]
            lists.append((f"rows.{name}.reference", named, self.references))
        if self.gradients is not None:
            lists.append(("gradients.tasks", self.gradients.tasks, self.tasks))
            lists.append(("gradients.rows", self.gradients.rows or [], self.rows))
            lists.append(("gradients.trained_by", [self.gradients.trained_by], self.rows))
        for name, reference in self.references.items():
            lists.append((f"references.{name}.tasks", reference.tasks or [], self.tasks))
            lists.append((f"references.{name}.greedy", reference.greedy, self.tasks))
        for key, named, known in lists:
            if missing := [entry for entry in named if entry not in known]:
                raise UserError(
                    f"{key} names {', '.join(missing)}: give some of {', '.join(known)}"
                )

    def runs(self, *, smoke: bool = False) -> Iterator[Run]:
        """Returns all runs, seed after seed, so that the first seed is complete first.

        Args:
            smoke: Whether to return only the smoke runs.
        """
        most = max(len(row.seeds or self.seeds) for row in self.rows.values())
        for index, task, (name, row) in itertools.product(
            range(most), self.tasks, self.rows.items()
        ):
            seeds = row.seeds or self.seeds
            if index >= len(seeds) or (row.tasks is not None and task not in row.tasks):
                continue
            if smoke and (index or task not in self.smoke.tasks or name not in self.smoke.rows):
                continue
            if self.gradients is None or task not in self.gradients.tasks:
                yield self.run(name, task, seeds[index], self.smoke.config if smoke else {})

    def run(self, row: str, task: str, seed: int, config: dict[str, Any]) -> Run:
        """Returns one run.

        Args:
            row: Name of the row.
            task: Name of the task.
            seed: The seed.
            config: Keys merged over all others.
        """
        overlays = [self.tasks[task], self.rows[row].config, config]
        configs = (*self.configs, *self.rows[row].configs)
        return Run(row, task, seed, configs, tuple(filter(None, overlays)))


def _make(kind: type[Any], keys: Any, where: str) -> Any:
    """Makes a part of a plan from the keys of a file."""
    known = {entry.name: entry for entry in fields(kind)}
    if not isinstance(keys, dict):
        raise UserError(f"{where} is {keys!r}: give the keys {', '.join(known)}")
    if unknown := sorted(set(keys) - set(known)):
        raise UserError(f"{where} has no key {', '.join(unknown)}: its keys are {', '.join(known)}")
    missing = [
        name
        for name, entry in known.items()
        if name not in keys and entry.default is MISSING and entry.default_factory is MISSING
    ]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: add what is missing")
    return kind(**keys)


def _references(keys: Any) -> dict[str, Reference]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--references", type=dict[str, Reference])
    # A copy: parsing changes its argument, and parts of a plan may be shared by YAML anchors.
    found: dict[str, Reference] = parser.instantiate_classes(
        parser.parse_object({"references": copy.deepcopy(keys)})
    ).references
    return found


def _found(configs: list[str]) -> list[str]:
    """Returns configurations, those in :data:`CONFIGS` as paths and others by name."""
    return [str(CONFIGS / name) if (CONFIGS / name).is_file() else name for name in configs]


def read_plan(file: str | PathLike[str]) -> Plan:
    """Reads the plan of an experiment.

    Args:
        file: A YAML file with the keys of :class:`Plan`. Configurations are files in
            :data:`CONFIGS` or shipped ones.

    Returns:
        The plan.

    Raises:
        UserError: If a key is unknown or missing, or refers to nothing.
        argparse.ArgumentError: If a reference does not fit its keys.
    """
    keys = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if isinstance(keys, dict):
        # Keys merged over a configuration stay as they are; fit reports those that do not fit.
        rows = keys.get("rows") or {}
        keys["rows"] = {name: _make(Row, row, f"rows.{name}") for name, row in rows.items()}
        keys["references"] = _references(keys.get("references") or {})
        for name, kind in (("smoke", Smoke), ("gradients", Gradients)):
            if name in keys:
                keys[name] = _make(kind, keys[name], name)
        listed: dict[str, type] = {"published": Published, "goals": Goal}
        for name, entry in listed.items():
            keys[name] = {
                task: [_make(entry, one, f"{name}.{task}") for one in given]
                for task, given in (keys.get(name) or {}).items()
            }
    plan: Plan = _make(Plan, keys, Path(file).name)
    plan.configs = _found(plan.configs)
    for row in plan.rows.values():
        row.configs = _found(row.configs)
    return plan
