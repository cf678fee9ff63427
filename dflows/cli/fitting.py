"""A run from its arguments to its record."""

import time
from collections.abc import Sequence
from pathlib import Path

from dflows.cli.callbacks import BestCheckpoint
from dflows.cli.configs import FlowCLI
from dflows.cli.noise import quiet
from dflows.cli.recording import make_record
from dflows.cli.summary import (
    end_processes,
    generate_samples,
    judge,
    print_report,
    print_samples,
    stdout_console,
    trainer_device,
)
from dflows.errors import UserError
from dflows.provenance import describe_device, revision
from dflows.records import write_record

__all__ = ["fit"]


def fit(arguments: Sequence[str]) -> None:
    """Trains, tests the best checkpoint, prints the figures and records them.

    Args:
        arguments: Those of `python -m dflows.fit`; `sys.argv` must hold them too where several
            processes train.

    Raises:
        UserError: If the settings cannot be honoured.
    """
    begin, code = time.perf_counter(), revision()
    quiet()
    if not arguments:
        raise UserError("nothing is given to fit: add --config quickstart.yaml, or another")
    cli = FlowCLI(arguments)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    try:
        trainer.fit(module, datamodule=data, ckpt_path=cli.config.ckpt_path, weights_only=True)
    except BaseException:
        cli.forget_unused_folder()
        raise
    best = next(
        entry for entry in trainer.checkpoint_callbacks if isinstance(entry, BestCheckpoint)
    )
    steps = trainer.global_step
    if best.best_model_path:
        if not Path(best.best_model_path).is_file():
            raise UserError(
                f"the best checkpoint of the run, {best.best_model_path}, is gone: put it back, or "
                "go on from the last one for more steps"
            )
        weights = trainer.strategy.load_checkpoint(best.best_model_path, weights_only=True)
        module.load_state_dict(weights["state_dict"])
    # The tested weights are validated again: they need not be those of the last validation.
    splits = []
    for split, run in (("valid", trainer.validate), ("test", trainer.test)):
        if any(
            f"{split}_bpc" in metrics for metrics in run(module, datamodule=data, verbose=False)
        ):
            splits.append(split)
    end_processes()
    if trainer.is_global_zero:
        # The trainer puts a module back into the mode that it found it in, which is training's.
        module.to(trainer_device(trainer)).eval()
        console = stdout_console()
        exact_states = cli.config.exact_states
        report = judge(module, data, splits, cli.stopwatch, steps=steps, exact_states=exact_states)
        device = describe_device(trainer_device(trainer), trainer.world_size)
        report.row("precision of training", trainer.precision, device)
        report += module.report_generation(data.length)
        samples = generate_samples(module, data, cli.config.seed_everything or 0)
        report += data.report_samples(samples)
        title = f"{cli.config.name}, {best.best_model_path or 'not saved'}"
        print_report(report, console, title)
        print_samples(console, samples)
        record = make_record(
            trainer,
            report,
            name=cli.config.name,
            kind="fit",
            config=cli.resolved_config(),
            code=code,
            seconds=time.perf_counter() - begin,
            budget=cli.config.budget,
        )
        for folder in (cli.folder.path, cli.config.record):
            if folder is not None:
                console.print(f"record: {write_record(folder, record)}", highlight=False)
