"""Records of how far the gradients of rules and objectives are from the exact ones."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules import EnumerableDataModule
from dflows.cli.configs import FlowCLI
from dflows.errors import UserError
from dflows.exact import compare_objectives
from dflows.gradients import GradientRule
from dflows.objectives import Objective
from experiments.overlays import merge_configs
from experiments.plan import Gradients, Plan, gradients_name
from experiments.recording import described, write_exact_record
from lightning_modules import FlowModule

__all__ = ["write_gradients"]


def _trained(
    plan: Plan, gradients: Gradients, task: str, seed: int, over: Mapping[str, Any]
) -> FlowCLI:
    """Trains the networks that gradients are compared at."""
    config = merge_configs([], [gradients.config, over])
    with plan.run(gradients.trained_by, task, seed, config).arguments() as line:
        cli = FlowCLI(line)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, weights_only=True)
    return cli


def _row(plan: Plan, row: str, task: str, seed: int) -> tuple[GradientRule | None, Objective]:
    """Returns the rule of a row's bijections, where they have one, and its objective."""
    with plan.run(row, task, seed, {}).arguments() as line:
        module = FlowCLI(line).model
    rule: GradientRule | None = module.flow.conditional_transforms[0].bijection.rule
    return rule, module.objective


def write_gradients(
    plan: Plan,
    task: str,
    rows: list[str],
    folder: Path,
    over: Mapping[str, Any],
    seed: int = 0,
) -> Iterator[Path]:
    """Compares the rules and objectives of rows on a task, and writes a record of each.

    Args:
        plan: The experiment.
        task: Name of the task.
        rows: Names of the rows that are compared.
        folder: Where the records go.
        over: Keys merged over those of the run that trains the networks.
        seed: The seed.

    Returns:
        The records' files.

    Raises:
        UserError: If the experiment compares no gradients, the task's states cannot be enumerated,
            or its model is no flow.
    """
    begin = time.perf_counter()
    gradients = plan.gradients
    if gradients is None:
        raise UserError("the experiment compares no gradients: give it the key `gradients`")
    cli = _trained(plan, gradients, task, seed, over)
    module, data = cli.model, cli.datamodule
    if not isinstance(module, FlowModule) or not isinstance(data, EnumerableDataModule):
        raise UserError(
            f"gradients are compared on {task}, which trains a {type(module).__name__} on a "
            f"{type(data).__name__}: give a flow and a distribution whose states are enumerated"
        )
    trained_by = {row: _row(plan, row, task, seed) for row in rows}
    compared = compare_objectives(
        module.flow,
        trained_by,
        data.probabilities,
        trained=module.objective,
        batch_size=gradients.batch_size,
        num_samples=gradients.num_samples,
        batches=gradients.batches,
        seed=seed,
    )
    for row, comparison in compared.items():
        rule, objective = trained_by[row]
        yield write_exact_record(
            folder,
            module,
            name=gradients_name(row, task),
            kind="gradients",
            config={
                "trained": cli.resolved_config(),
                "rule": None if rule is None else described(rule),
                "objective": described(objective),
            },
            metrics=comparison.metrics,
            begin=begin,
            seed=seed,
        )
