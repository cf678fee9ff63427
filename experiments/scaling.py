"""Measures how training goes on one process and on two, and what a GPU has to do for it.

    python -m experiments.scaling --record results/scaling

Each system trains for some steps as ``python -m dflows.fit`` does: in one process, and in two, each
with a batch and a thread of its own. The seconds of a step and the memory that a process takes are
measured where they arise; ``python -m experiments.report`` compares them with the formula of
:mod:`experiments.planning`, and makes the plan of `docs/guide/scaling.md` from it. Nothing else
should run meanwhile.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import distributed
from torch.autograd.profiler import profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from dflows.cli.configs import FlowCLI, Parser
from dflows.cli.errors import run_command
from dflows.cli.noise import quiet
from dflows.errors import UserError
from dflows.files import write_text
from dflows.memory import most_held
from dflows.provenance import describe_device
from dflows.records import Record, write_record
from experiments.children import environment
from experiments.planning import WEIGHT_BYTES
from lightning_modules.estimates import saved_bytes

__all__ = ["PLANNED", "SYSTEMS", "Measure", "count_work", "main", "scaling"]

SYSTEMS: Mapping[str, tuple[str, ...]] = {
    "lanes": ("--config", "text/lanes.yaml"),
    "transformer": (
        *("--config", "text/transformer.yaml", "--data.batch_size", "2"),
        *("--model.flow.backbone.width", "384", "--model.flow.backbone.layers", "8"),
        *("--model.flow.backbone.heads", "6"),
    ),
}
"""What is trained here: a small network, and one of which the memory of weights counts."""

SMOKE = ("--config", "smoke/lanes.yaml")

PLANNED = (
    # Of the King James text, which is at hand; memory and operations hardly depend on the text.
    *("--config", "text/gpu/lanes-transformer.yaml", "--data.source", "null"),
    *("--trainer.accelerator", "cpu", "--trainer.precision", "bf16-mixed"),
)
"""The configuration that the plan is of, as a GPU would compute it."""

TRAIN = "train"
"""The first argument of a process that trains, and evaluates nothing after it."""

BEGIN = "training begins"

PROFILED, WARM = 2, 4
"""Steps of which memory is counted, and steps of which time is not."""


class Measure(Callback):
    """Creates what measures the steps of every process, and the memory that they take.

    Memory is that of tensors, on a CPU: at most, in the first two steps.

    Args:
        folder: Where each process leaves what it measured, by its number.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._ends: list[float] = []
        self._profile = profile(profile_memory=True)
        self._link: float | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begins to count the memory of gradients, moments and what sends them."""
        self._profile.__enter__()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measures how quickly gradients travel."""
        if trainer.world_size > 1:
            gradients = torch.zeros(_parameters(pl_module))
            seconds = []
            for _ in range(6):
                begin = time.perf_counter()
                distributed.all_reduce(gradients)
                seconds.append(time.perf_counter() - begin)
            share = (trainer.world_size - 1) / trainer.world_size
            sent = 2 * share * WEIGHT_BYTES * gradients.numel()
            self._link = sent / statistics.median(seconds[1:])
        with record_function(BEGIN):
            pass

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the time, and ends the count of memory."""
        if batch_idx == PROFILED - 1:
            self._profile.__exit__(None, None, None)
        self._ends.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Writes what was measured."""
        ends = self._ends[WARM - 1 :]
        # A mean: what is waited for at some steps belongs to all.
        seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
        weights = WEIGHT_BYTES * _parameters(pl_module)
        measured = {
            "precision": trainer.precision,
            "step_seconds": seconds,
            "process_bytes": most_held(self._profile, BEGIN) + weights,
            **({} if self._link is None else {"link_bandwidth": self._link}),
        }
        write_text(Path(self.folder) / f"{trainer.global_rank}.json", json.dumps(measured))


def _parameters(module: torch.nn.Module) -> int:
    return sum(one.numel() for one in module.parameters() if one.requires_grad)


def count_work(arguments: Sequence[str], rows: int = 2) -> dict[str, Any]:
    """Counts what the training step of a configuration has to do, without training.

    Args:
        arguments: The arguments of `dflows.fit`.
        rows: Examples that are computed to find out.

    Returns:
        `parameters`; `batch_characters`, those of a batch; `batch_bytes`, which its backward pass
        needs; and `batch_operations`, but for those of cells, which PyTorch does not count.
    """
    with tempfile.TemporaryDirectory() as folder:
        cli = FlowCLI([*arguments, "--trainer.logger.save_dir", folder])
        module, data = cli.model, cli.datamodule
        module.trainer = cli.trainer
        module.train()
        generator = torch.Generator().manual_seed(0)
        classes = module.flow.num_classes
        y = torch.randint(classes, (rows, data.length), generator=generator)
        more = saved_bytes(module, y) - saved_bytes(module, y[:1])
        counter = FlopCounterMode(display=False)
        with counter, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module.evaluate_objective(y).mean().backward()
    scale = data.batch_size / rows
    return {
        "parameters": _parameters(module),
        "batch_characters": data.batch_size * data.length,
        "batch_bytes": round(data.batch_size * more / (rows - 1)),
        "batch_operations": round(counter.get_total_flops() * scale),
    }


def _train(arguments: Sequence[str], processes: int, steps: int) -> list[dict[str, Any]]:
    """Returns what each process measured."""
    with tempfile.TemporaryDirectory() as folder:
        line = [
            *(sys.executable, "-m", "experiments.scaling", TRAIN, *arguments),
            *("--trainer.max_steps", str(steps), "--trainer.max_time", "null"),
            *("--trainer.limit_val_batches", "0"),
            *("--trainer.devices", str(processes)),
            *("--trainer.strategy", "auto" if processes == 1 else "ddp"),
            *("--trainer.callbacks", "experiments.scaling.Measure"),
            *("--trainer.callbacks.folder", folder),
        ]
        done = subprocess.run(  # noqa: S603 - our own command
            line,
            cwd=folder,
            env=environment(OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UserError(f"training ended with {done.returncode}: {done.stderr.strip()}")
        return [
            json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8"))
            for rank in range(processes)
        ]


def scaling(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments.

    Raises:
        UserError: If a training fails.
    """
    quiet()
    if arguments[:1] == [TRAIN]:
        cli = FlowCLI(arguments[1:])
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        return
    parser = Parser(prog="python -m experiments.scaling")
    parser.add_argument("--smoke", action="store_true", help="Measure a tiny network.")
    parser.add_argument("--steps", type=int, default=40, help="Steps of each training.")
    parser.add_argument(
        "--rounds", type=int, default=3, help="Trainings, of which the median counts."
    )
    parser.add_argument("--record", type=str, default="results/scaling", help="Folder of records.")
    given = parser.parse_args(list(arguments))
    torch.set_num_threads(1)
    folder = given.record
    for name, system in ({"smoke": SMOKE} if given.smoke else SYSTEMS).items():
        work = count_work(system)
        del work["batch_operations"]
        begin = time.perf_counter()
        # In turns, so that what else the machine does meets both.
        rounds = [
            {processes: _train(system, processes, given.steps) for processes in (1, 2)}
            for _ in range(given.rounds)
        ]
        for processes in (1, 2):
            measured = [one[processes] for one in rounds]
            metrics = {**work, "steps": given.steps, **_summarise(measured)}
            rate = processes * work["batch_characters"] / metrics["step_seconds"]
            metrics["characters_per_second"] = rate
            record = _record(name, processes, metrics, measured[0][0]["precision"], begin)
            write_record(folder, record)
            print(f"{name}: {rate:,.0f} characters a second with {processes} of 1 thread")
    begin = time.perf_counter()
    work = count_work(SMOKE if given.smoke else PLANNED)
    write_record(folder, _record("planned", 0, work, "bf16-mixed", begin))


def _summarise(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns the metrics of all rounds: of the slowest process in each."""
    slowest = [max(one["step_seconds"] for one in processes) for processes in rounds]
    metrics: dict[str, Any] = {
        "step_seconds": statistics.median(slowest),
        "process_bytes": max(one["process_bytes"] for processes in rounds for one in processes),
    }
    if "link_bandwidth" in rounds[0][0]:
        links = [min(one["link_bandwidth"] for one in processes) for processes in rounds]
        metrics["link_bandwidth"] = statistics.median(links)
    return metrics


def _record(
    system: str, processes: int, metrics: Mapping[str, Any], precision: str, begin: float
) -> Record:
    metrics = dict(metrics)
    return Record(
        name=f"{system}-{processes}" if processes else system,
        kind="scaling",
        config={"system": system, "processes": processes},
        seed=0,
        device=describe_device("cpu", max(1, processes)),
        precision=precision,
        seconds=time.perf_counter() - begin,
        parameters=metrics.pop("parameters"),
        metrics=metrics,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: scaling(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
