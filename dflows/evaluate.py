"""Scores a split with a checkpoint, every character once.

    python -m dflows.evaluate --checkpoint runs/quickstart/version_0/best.ckpt

The checkpoint alone says what the model and the data are; every key of the data is an argument,
so that other text can be scored with the same vocabulary (``--data.source ...``).
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.callbacks import ProgressBar as AnyProgressBar
from pytorch_lightning.plugins.precision import DoublePrecision

from datamodules.module import StreamDataModule
from dflows.cli.callbacks import Certificates, Stopwatch
from dflows.cli.checkpoints import (
    Checkpoint,
    add_checkpoint_arguments,
    checkpoint_argument,
    load_model,
    read_checkpoint,
)
from dflows.cli.configs import Parser, resolved_arguments
from dflows.cli.errors import run_command
from dflows.cli.logs import Heartbeat, add_log_level, set_log_level
from dflows.cli.noise import quiet
from dflows.cli.output import patient_output
from dflows.cli.progress import ProgressBar, ProgressLines
from dflows.cli.proofs import check_provable, prove
from dflows.cli.recording import make_record
from dflows.cli.split import config_of
from dflows.cli.summary import (
    end_processes,
    judge,
    print_report,
    stdout_console,
    trainer_device,
)
from dflows.cli.trainer import PRECISIONS, Trainer
from dflows.errors import UserError
from dflows.provenance import revision
from dflows.records import check_folder, check_name, write_record

__all__ = ["evaluate", "main"]


def _parser() -> Parser:
    parser = Parser(prog="python -m dflows.evaluate")
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="Configuration of the data."
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--passes", type=int | None, default=None, help="Passes to generate; the model's own."
    )
    parser.add_argument("--split", type=Literal["test", "valid"], default="test")
    parser.add_argument(
        "--archive", action="store_true", help="Encode the split and decode it, as a proof."
    )
    parser.add_argument("--name", type=str | None, default=None, help="Name of the record.")
    parser.add_argument(
        "--record", type=str | None, default=None, help="Folder that gets a record of the figures."
    )
    add_log_level(parser)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.set_defaults(
        {
            "trainer.logger": False,
            "trainer.enable_checkpointing": False,
            "trainer.enable_model_summary": False,
            "trainer.use_distributed_sampler": False,
        }
    )
    parser.add_lightning_class_args(StreamDataModule, "data", subclass_mode=True)
    return parser


def _config_of(checkpoint: Checkpoint, allowed: Sequence[str], folder: Path) -> Path:
    """Writes the configuration that the arguments are laid over.

    Raises:
        UserError: If the checkpoint names no precision that there is.
    """
    data = config_of(checkpoint, allowed, folder)
    trainer = checkpoint.config.get("trainer")
    precision = trainer.get("precision") if isinstance(trainer, dict) else None
    if precision not in PRECISIONS:
        raise UserError(
            f"{checkpoint.path} names a precision of training that there is not: its description "
            "is not dflows' own, so train the model again"
        )
    file = folder / "checkpoint.yaml"
    text = yaml.safe_dump({"data": data, "trainer": {"precision": precision}})
    file.write_text(text, encoding="utf-8")
    return file


def _put_back_vocabulary(data: dict[str, Any], checkpoint: Checkpoint, folder: Path) -> None:
    """Replaces the temporary file of the checkpoint's vocabulary by its own setting."""
    arguments = data.get("init_args", {})
    if arguments.get("vocabulary") == str(folder / "tokenizer.json"):
        arguments["vocabulary"] = checkpoint.config["data"]["init_args"]["vocabulary"]


def evaluate(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments; `sys.argv` must hold them too where several processes evaluate.

    Raises:
        UserError: If the arguments cannot be honoured.
    """
    begin, code = time.perf_counter(), revision()
    quiet()
    parser = _parser()
    path, allowed = checkpoint_argument(arguments)
    if path is None:
        if not {"-h", "--help"} & set(arguments):
            raise UserError("no checkpoint is given: add --checkpoint PATH")
        parser.print_help()
        return
    checkpoint = read_checkpoint(path)
    module = load_model(checkpoint, allowed)
    with (
        patient_output(),
        Heartbeat() as heartbeat,
        tempfile.TemporaryDirectory() as folder,
        resolved_arguments(arguments) as resolved,
    ):
        given = ["--config", str(_config_of(checkpoint, allowed, Path(folder))), *resolved]
        config = parser.parse_args(given)
        set_log_level(config.log_level)
        lines = ProgressLines()
        if config.trainer.enable_progress_bar is not False:
            heartbeat.start(lines.every_seconds)
        data_config = yaml.safe_load(parser.dump(config, skip_none=False))["data"]
        _put_back_vocabulary(data_config, checkpoint, Path(folder))
        made = parser.instantiate_classes(config)
        data, split = made.data, config.split
        data.check_length(checkpoint.length)
        longer = data.length if data.length > checkpoint.length else None
        module.resize(passes=config.passes, length=longer)
        if data.vocabulary != checkpoint.vocabulary:
            raise UserError(
                f"the data have another vocabulary of {data.num_classes} classes than the "
                f"checkpoint with its {checkpoint.vocabulary.num_classes}: leave data.vocabulary "
                "to the checkpoint"
            )
        name = config.name or f"{checkpoint.config.get('name') or 'dflows'}-{split}"
        check_name("--name", name)
        if config.record is not None:
            check_folder(config.record)
        stopwatch = Stopwatch()
        callbacks = made.trainer.pop("callbacks") or []
        callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        shown: list[Callback] = []
        if made.trainer.enable_progress_bar is not False:
            own = any(isinstance(callback, AnyProgressBar) for callback in callbacks)
            shown = [lines] if own else [ProgressBar(), lines]
        trainer = Trainer(**made.trainer, callbacks=[Certificates(), *callbacks, *shown, stopwatch])
        if not isinstance(trainer.precision_plugin, DoublePrecision):
            module.float()
        run = trainer.test if split == "test" else trainer.validate
        if config.archive:
            check_provable(module, trainer, split)
        run(module, datamodule=data, verbose=False)
        end_processes()
        if trainer.is_global_zero:
            report = judge(module, data, [split], stopwatch)
            if config.archive:
                report += prove(module.to(trainer_device(trainer)).eval(), data, split)
            written = None
            if config.record is not None:
                record = make_record(
                    trainer,
                    report,
                    name=name,
                    kind="evaluate",
                    config={**checkpoint.config, "data": data_config},
                    code=code,
                    seconds=time.perf_counter() - begin,
                )
                written = write_record(config.record, record)
            print_report(report, stdout_console(), str(checkpoint.path))
            if written is not None:
                stdout_console().print(f"record: {written}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: evaluate(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
