"""A run from its arguments to its record."""

import time
from collections.abc import Sequence
from pathlib import Path

from dflows.cli.configs import FlowCLI
from dflows.cli.logs import Heartbeat
from dflows.cli.noise import quiet
from dflows.cli.output import patient_output
from dflows.cli.proofs import check_provable, prove
from dflows.cli.recording import below_here, make_record, write_records
from dflows.cli.saving import BestCheckpoint
from dflows.cli.slurm import RequeueRequest, requeue
from dflows.cli.stopping import StopBetweenSteps
from dflows.cli.summary import (
    end_processes,
    generate_samples,
    judge,
    print_report,
    print_samples,
    stdout_console,
    trainer_device,
)
from dflows.errors import UserError, chain_of
from dflows.files import named, unwritable
from dflows.provenance import describe_device, revision

__all__ = ["fit"]


def fit(arguments: Sequence[str]) -> None:
    """Trains, tests the best checkpoint, prints the figures and records them.

    Args:
        arguments: Those of `python -m dflows.fit`; `sys.argv` must hold them too where several
            processes train.

    Raises:
        UserError: If the settings cannot be honoured, or a file cannot be written.
        RequeueRequest: If SLURM said that the time of the job is up, and starts it again.
    """
    begin, code = time.perf_counter(), revision()
    quiet()
    if not arguments:
        raise UserError("nothing is given to fit: add --config quickstart.yaml, or another")
    stop = StopBetweenSteps()
    with Heartbeat() as heartbeat, stop.listening(), patient_output():
        cli = FlowCLI(arguments, stop, heartbeat)
        try:
            if cli.config.archive:
                check_provable(cli.model, cli.trainer)
            cli.folder.claim(cli.trainer)
            cli.trainer.fit(
                cli.model,
                datamodule=cli.datamodule,
                ckpt_path=cli.config.ckpt_path,
                weights_only=True,
            )
            _judge(cli, code, begin)
        except BaseException as error:
            _note(error, cli)
            raise
        finally:
            cli.folder.leave()


def _note(error: BaseException, cli: FlowCLI) -> None:
    """Notes how the run of an error goes on.

    Raises:
        UserError: If a file could not be written, and the error does not say which.
    """
    kept, folder = cli.config_init.last_checkpoint.best_model_path, cli.folder.path
    note = ""
    if kept and Path(kept).is_file():
        note = f"--ckpt_path {below_here(Path(kept))} resumes it"
    if isinstance(error, RequeueRequest) and cli.trainer.is_global_zero and folder is not None:
        note = f"job {requeue()} is requeued, and goes on in {below_here(folder)}"
    said = error
    if isinstance(error, OSError) and unwritable(error):
        said = named(error.filename or folder or "the run", error)
    of_a_file = any(isinstance(cause, OSError) for cause in chain_of(error))
    if note and (of_a_file or not isinstance(error, Exception)):
        said.add_note(note)
    if said is not error:
        raise said from error


def _judge(cli: FlowCLI, code: str, begin: float) -> None:
    """Evaluates the best checkpoint, and records and prints what it is worth.

    Args:
        cli: The run, which is trained.
        code: The revision when it began.
        begin: The time then.

    Raises:
        UserError: If the best checkpoint is gone, or the record cannot be written.
    """
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    best: BestCheckpoint = cli.config_init.best_checkpoint
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
    if not trainer.is_global_zero:
        return
    # The trainer puts a module back into the mode that it found it in, which is training's.
    module.to(trainer_device(trainer)).eval()
    exact_states = cli.config.exact_states
    report = judge(module, data, splits, cli.stopwatch, steps=steps, exact_states=exact_states)
    failed: Exception | None = None
    if cli.config.archive:
        try:
            report += prove(module, data, "test")
        except Exception as error:  # noqa: BLE001 - raised when the record is written
            failed = error
    device = describe_device(trainer_device(trainer), trainer.world_size)
    report.row("precision of training", trainer.precision, device)
    report += module.report_generation(data.length)
    samples = generate_samples(module, data, cli.config.seed_everything or 0)
    report += data.report_samples(samples)
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
    # First what lasts: what prints may end.
    written = write_records((cli.folder.path, cli.config.record), record)
    console = stdout_console()
    print_report(report, console, f"{cli.config.name}, {best.best_model_path or 'not saved'}")
    print_samples(console, samples)
    for file in written:
        console.print(f"record: {file}", highlight=False)
    if failed is not None:
        raise failed
