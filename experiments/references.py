"""The best tabular flow of each task of an experiment, as a record."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules import EnumerableDataModule
from datamodules.module import StreamDataModule
from dflows.errors import UserError
from dflows.exact import exhaustive_optimum, tabular_flow
from experiments.plan import Plan, Reference, reference_name
from experiments.recording import described, write_exact_record
from lightning_modules.descriptions import instantiate

__all__ = ["reference_settings", "task_data", "write_reference"]

EXHAUSTIBLE = 4
"""The most states of which the best of all bijections is found as well."""

SAMPLING_KEYS = ("batch_size", "eval_batch_size", "eval_examples")
"""Keys of the data about samples alone, which a table does not see."""


def task_data(config: Mapping[str, Any]) -> EnumerableDataModule:
    """Makes the data of a task.

    Args:
        config: The merged keys of the experiment and the task.

    Raises:
        UserError: If its states cannot be enumerated.
    """
    base: type[StreamDataModule] = StreamDataModule  # type: ignore[type-abstract]
    data = instantiate(base, config["data"], [], "the configuration")
    if not isinstance(data, EnumerableDataModule):
        raise UserError(
            f"a {type(data).__name__} has no table of probabilities, and so no tabular reference: "
            "remove `references`"
        )
    return data


def reference_settings(
    plan: Plan, name: str, task: str, num_classes: int, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the settings of a reference, as its record holds them.

    Args:
        plan: The experiment.
        name: Name of the reference.
        task: Name of the task.
        num_classes: K of the task.
        config: The keys of its data.
    """
    reference = plan.references[name]
    data = dict(config["init_args"])
    for key in SAMPLING_KEYS:
        data.pop(key, None)
    return {
        "orderings": [repr(ordering) for ordering in reference.orderings],
        "bijection": described(reference.bijection(num_classes)),
        "base": None if reference.base is None else repr(reference.base),
        "restarts": reference.restarts,
        "sweeps": reference.sweeps,
        "greedy": task in reference.greedy,
        "data": {"class_path": config["class_path"], "init_args": data},
    }


def write_reference(
    plan: Plan,
    name: str,
    task: str,
    data: EnumerableDataModule,
    config: Mapping[str, Any],
    folder: Path,
) -> Path:
    """Finds the best tabular flow of a task, and writes its record.

    Args:
        plan: The experiment.
        name: Name of the reference.
        task: Name of the task.
        data: The data of the task.
        config: The keys of the data.
        folder: The folder of the record.

    Returns:
        The record's file.

    Raises:
        UserError: If there are too many states, or the stack has no tables that can be found.
    """
    begin = time.perf_counter()
    reference: Reference = plan.references[name]
    bijection = reference.bijection(data.num_classes)
    found = tabular_flow(
        data.probabilities,
        reference.orderings,
        bijection,
        base=reference.base,
        restarts=0 if task in reference.greedy else reference.restarts,
        sweeps=0 if task in reference.greedy else reference.sweeps,
    )
    metrics = {
        "reference_nats": found.cross_entropy,
        "layerwise_nats": found.layerwise,
        "reference_kl": found.cross_entropy - data.entropy,
        "entropy": data.entropy,
        "factorized_entropy": data.factorized_entropy,
    }
    if data.num_classes**data.length <= EXHAUSTIBLE:
        metrics["exhaustive_nats"] = exhaustive_optimum(data.probabilities)
    return write_exact_record(
        folder,
        found.flow,
        name=reference_name(name, task),
        kind="reference",
        config=reference_settings(plan, name, task, data.num_classes, config),
        metrics=metrics,
        begin=begin,
    )
