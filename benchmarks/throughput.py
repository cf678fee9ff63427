"""Training throughput of dflows.fit against a hand-written loop on the same network.

    python benchmarks/throughput.py --record results/benchmarks

Both train the quickstart's flow, from the same data module, with the same optimizer, precision,
clipping and schedule, in turns in one process. The hand-written loop is what one writes without
a framework; dflows.fit brings its progress bar, logger, metrics and checkpoints.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from dflows.cli.configs import FlowCLI
from dflows.cli.noise import quiet
from dflows.cli.recording import without_machine
from dflows.counted import Counted
from dflows.provenance import describe_device
from dflows.records import Record, write_record


def build(config: str, steps: int, folder: str) -> FlowCLI:
    """Builds model, data and trainer as the command does, for so many steps."""
    return FlowCLI(
        [
            *("--config", config),
            *("--trainer.accelerator", "cpu"),
            *("--trainer.max_steps", str(steps)),
            *("--trainer.limit_val_batches", "0"),
            *("--trainer.logger.save_dir", folder),
        ]
    )


def with_lightning(config: str, steps: int) -> tuple[float, FlowCLI]:
    """Returns the characters a second of dflows.fit, by its own stopwatch."""
    with tempfile.TemporaryDirectory() as folder:
        cli = build(config, steps, folder)
        with contextlib.redirect_stdout(io.StringIO()):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        characters = steps * cli.datamodule.batch_size * cli.datamodule.length
        return characters / cli.stopwatch.train_seconds, cli


def by_hand(config: str, steps: int) -> float:
    """Returns the characters a second of a plain loop."""
    with tempfile.TemporaryDirectory() as folder:
        cli = build(config, steps, folder)
    module, data = cli.model, cli.datamodule
    flow, settings, refit = module.flow, module.optimization, module.base_refit
    flow.base.init_from_counts(data.class_counts())
    for part in flow.modules():
        if isinstance(part, Counted):
            part.count(data.training_chunks())
    half = cli.trainer.precision == "bf16-mixed"
    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: settings.factor(step, step / steps)
    )
    batches = iter(data.train_dataloader())
    module.train()
    begin = time.perf_counter()
    characters = 0
    for step in range(1, steps + 1):
        y = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = -module.objective(flow, y, progress=(step - 1) / steps).mean() / y.shape[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if refit is not None and step % refit.every == 0:
            refit.update(flow, refit.count(flow, flow.residuals(y)[-1]))
        characters += y.numel()
    return characters / (time.perf_counter() - begin)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="quickstart.yaml")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", type=Path, default=None, help="folder for the two records")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]
    quiet()
    by_hand(options.config, 20)  # warm-up
    speeds: dict[str, list[float]] = {"lightning": [], "plain": []}
    begin = time.perf_counter()
    for _ in range(options.repeats):
        speed, cli = with_lightning(options.config, options.steps)
        speeds["lightning"].append(speed)
        speeds["plain"].append(by_hand(options.config, options.steps))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"{name}: {', '.join(f'{value:,.0f}' for value in values)} characters a second")
    print(f"plain over lightning, medians: {medians['plain'] / medians['lightning']:.3f}")
    if options.record is not None:
        for name, speed in medians.items():
            record = Record(
                name=f"throughput-{name}",
                kind="benchmark",
                config=without_machine(cli.resolved_config()),
                seed=int(cli.config.seed_everything or 0),
                device=describe_device("cpu"),
                precision=cli.trainer.precision,
                seconds=time.perf_counter() - begin,
                parameters=sum(parameter.numel() for parameter in cli.model.parameters()),
                metrics={"characters_per_second": speed, "steps": options.steps},
            )
            print(write_record(options.record, record))


if __name__ == "__main__":
    main()
