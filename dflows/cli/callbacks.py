"""Callbacks of every run: its folder, checkpoints, the clock."""

import inspect
import math
import pkgutil
import shutil
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from datamodules.module import StreamDataModule
from dflows.cli.checkpoints import describe_run
from dflows.cli.together import stops_together
from dflows.errors import NonFiniteError, chain_of
from dflows.reporting import Report
from lightning_modules import BaseModule
from lightning_modules.checkpoints import KEY

__all__ = [
    "BestCheckpoint",
    "Certificates",
    "LastCheckpoint",
    "RunFolder",
    "SaveRun",
    "Stopwatch",
    "plain_config",
    "run_folder",
]


class RunFolder(Callback):
    """Creates what settles the folder of a run: the logger's, or one of its own.

    Args:
        name: Name of the run.
        resumed: The folder of the run that this one continues, if it is one.
        checkpoint: The checkpoint that it resumes from.
    """

    def __init__(
        self, name: str, resumed: Path | None = None, checkpoint: Path | None = None
    ) -> None:
        self.name = name
        self.resumed = resumed
        self.checkpoint = checkpoint
        self.path: Path | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the folder, which all processes share, and tells checkpoints of it."""
        if self.path is None:
            found = str(self._find(trainer).absolute()) if trainer.is_global_zero else None
            self.path = Path(str(trainer.strategy.broadcast(found)))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, _Checkpoint):
                callback.dirpath = callback.dirpath or str(self.path)
                if self.checkpoint is not None:
                    callback.resumed_from = self.checkpoint.absolute().parent

    def _find(self, trainer: pl.Trainer) -> Path:
        logger = trainer.logger
        if isinstance(logger, (TensorBoardLogger, CSVLogger)):
            return Path(logger.log_dir)
        if logger is None and self.resumed is not None:
            return self.resumed
        save_dir, name, version = None, None, None
        if logger is not None:
            save_dir, name, version = logger.save_dir, logger.name, logger.version
        parent = Path(save_dir or Path(trainer.default_root_dir) / "runs") / (name or self.name)
        if isinstance(version, str):
            return parent / version
        return parent / f"version_{_next_version(parent) if version is None else version}"


def _next_version(parent: Path) -> int:
    numbers = [path.name.removeprefix("version_") for path in parent.glob("version_*")]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Returns the folder of a trainer's run, once it is set up."""
    found = (entry for entry in trainer.callbacks if isinstance(entry, RunFolder))  # type: ignore[attr-defined]
    folder = next(found, None)
    return None if folder is None else folder.path


class _Checkpoint(ModelCheckpoint):
    """Creates checkpoints in the folder of the run, under one name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            save_top_k=1, auto_insert_metric_name=False, enable_version_counter=False, **kwargs
        )
        self.resumed_from: Path | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the best so far, wherever its folder has come to lie."""
        kept = state_dict.get("best_model_path")
        if kept and state_dict["dirpath"] != self.dirpath:
            found = self._find(Path(kept))
            if found is None:
                rank_zero_warn(f"the checkpoint {kept} is gone: the search starts again")
                return
            # It is read from there until it is brought into the folder of the run.
            score = state_dict["best_model_score"]
            state_dict = {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": str(found),
                "kth_best_model_path": str(found),
                "best_k_models": {str(found): score},
                "last_model_path": "",
            }
        super().load_state_dict(state_dict)

    def _find(self, kept: Path) -> Path | None:
        """Returns the current path of a checkpoint: next to the resumed one, if moved."""
        moved = None if self.resumed_from is None else self.resumed_from / kept.name
        return next((path for path in (moved, kept) if path and path.is_file()), None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Brings the best so far into the folder of the run."""
        super().on_train_start(trainer, pl_module)
        best = self.best_model_path
        if self.monitor is None or not best or self.dirpath is None:
            return
        here = Path(self.dirpath) / Path(best).name
        if here == Path(best) or not Path(best).is_file():
            return
        if trainer.is_global_zero:
            here.parent.mkdir(parents=True, exist_ok=True)
            unfinished = here.with_name(f".{here.name}.tmp")
            shutil.copyfile(best, unfinished)
            unfinished.replace(here)
        self.best_model_path = self.kth_best_model_path = str(here)
        self.best_k_models = {str(here): score for score in self.best_k_models.values()}

    def _ModelCheckpoint__warn_if_dir_not_empty(self, dirpath: str) -> None:  # noqa: N802
        """Keeps quiet: a resumed run stays in its folder."""


class BestCheckpoint(_Checkpoint):
    """Creates the checkpoint of the best validation.

    Args:
        monitor: What is compared.
        mode: Whether the smallest (`min`) or the largest (`max`) is the best.
        dirpath: Folder; that of the run where it is not given.
        filename: Name without its ending.
    """

    def __init__(
        self,
        monitor: str = "valid_bpc",
        mode: str = "min",
        dirpath: str | None = None,
        filename: str = "best",
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, dirpath=dirpath, filename=filename)


class LastCheckpoint(_Checkpoint):
    """Creates the checkpoint to resume from: after every validation, at the end and on failure.

    Args:
        every_n_train_steps: Steps from one to the next, in place of validations.
        dirpath: Folder; that of the run where it is not given.
        filename: Name without its ending.
        save_on_exception: Whether a run that is interrupted or fails saves where it is.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        dirpath: str | None = None,
        filename: str = "last",
        save_on_exception: bool = True,
    ) -> None:
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            dirpath=dirpath,
            filename=filename,
            save_on_exception=save_on_exception,
        )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Saves where the run is, if it has got anywhere and not diverged."""
        diverged = any(isinstance(cause, NonFiniteError) for cause in chain_of(exception))
        if trainer.global_step and not diverged and stops_together(trainer):
            super().on_exception(trainer, pl_module, exception)

    @property
    def state_key(self) -> str:
        """The same for all intervals, so that a resumed run may change its own."""
        return type(self).__name__


class SaveRun(SaveConfigCallback):
    """Creates what saves config.yaml and tokenizer.json with the checkpoints, and in them.

    Nothing is written before all checks have passed and training begins.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "overwrite": True})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Waits for :meth:`on_train_start`."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes config.yaml and tokenizer.json."""
        folder, data = run_folder(trainer), trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        config = used_config(self.config, pl_module, data)
        path = folder / self.config_filename
        self.parser.save(config, path, skip_none=False, overwrite=True, multifile=False)
        data.save_vocabulary(folder)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds a description of the model to the checkpoint."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        config = plain_config(self.parser, self.config, pl_module, data)
        checkpoint[KEY] = describe_run(config, data.vocabulary.to_json(), data.length)


def used_config(config: Any, module: pl.LightningModule, data: StreamDataModule) -> Any:
    """Returns a configuration with what Lightning's finders put in place of what was given."""
    used = config.clone()
    found = {
        "model.init_args.optimization": ("learning_rate", getattr(module, "learning_rate", None)),
        "data.init_args": ("batch_size", data.batch_size),
    }
    for group, (key, value) in found.items():
        settings = used.get(group)
        if isinstance(settings, Namespace) and key in settings:
            settings[key] = value
    return used


def plain_config(
    parser: Any, config: Any, module: pl.LightningModule, data: StreamDataModule
) -> dict[str, Any]:
    """Returns a resolved configuration in plain types, as it was used, links written out."""
    used = used_config(config, module, data)
    plain: dict[str, Any] = yaml.safe_load(parser.dump(used, skip_none=False, format="yaml"))
    linked = {"num_classes": data.num_classes, "length": data.length}
    made = plain["model"]
    _write_linked(made, type(module), linked)
    flow = made["init_args"].get("flow")
    if isinstance(flow, dict) and "class_path" in flow:
        _write_linked(flow, pkgutil.resolve_name(flow["class_path"]), linked)
    return plain


def _write_linked(made: dict[str, Any], maker: Any, linked: dict[str, int]) -> None:
    accepted = inspect.signature(maker).parameters
    arguments = made.setdefault("init_args", {})
    arguments.update({key: value for key, value in linked.items() if key in accepted})


class Stopwatch(Callback):
    """Creates a clock of training without its validations, and of evaluation.

    A resumed run continues the count, as its steps do.
    """

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self.train_characters = 0
        self.train_examples = 0
        self.test_seconds = 0.0
        self._since: float | None = None
        self._interval: int | float | None = None

    def report(self, steps: int, read: int | None = None, tested: int | None = None) -> Report:
        """Reports the speed of training and of evaluation.

        Args:
            steps: Optimizer steps.
            read: Characters that were learned from, where they were not read as training batches.
            tested: Characters of the test split.
        """
        report = Report()
        if self.train_seconds and self.train_characters:
            speed = (read or self.train_characters) / self.train_seconds
            report.metrics |= {
                "steps": steps,
                "train_seconds": self.train_seconds,
                "characters_per_second": speed,
                "examples_per_second": speed * self.train_examples / self.train_characters,
            }
            report.row("training, characters a second", f"{speed:,.0f}", f"{steps:,} steps in all")
        if self.test_seconds and tested:
            report.row(
                "evaluation, characters a second", f"{tested / self.test_seconds:,.0f}", "test"
            )
        return report

    def _stop(self) -> float:
        passed = 0.0 if self._since is None else time.perf_counter() - self._since
        self._since = None
        return passed

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been counted of the training."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return {
            "train_seconds": self.train_seconds + running,
            "train_characters": self.train_characters,
            "train_examples": self.train_examples,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned."""
        self.train_seconds = state_dict["train_seconds"]
        self.train_characters = state_dict["train_characters"]
        self.train_examples = state_dict["train_examples"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts."""
        self._since = time.perf_counter()
        epoch = trainer.fit_loop.epoch_loop
        if epoch.restarting and epoch.batch_progress.is_last_batch:
            # Lightning goes on in an epoch that is over, unless it sees that it was validated.
            self._interval, trainer.val_check_batch = trainer.val_check_batch, math.inf

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validates as often as was asked for, where a resumed run begins with the next epoch."""
        if self._interval is not None:
            self._interval, trainer.val_check_batch = None, self._interval

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts, and asks for the last validation when the last step or epoch is done."""
        indices = BaseModule.indices_of(batch)
        self.train_characters += indices.numel() * trainer.world_size
        self.train_examples += len(indices) * trainer.world_size
        last_epoch = 0 < (trainer.max_epochs or -1) <= trainer.current_epoch + 1
        ends = last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if ends or 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pauses."""
        self.train_seconds += self._stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on."""
        if trainer.training or (trainer.validating and trainer.state.fn == "fit"):
            self._since = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops."""
        self.train_seconds += self._stop()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts."""
        self._since = time.perf_counter()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops."""
        self.test_seconds += self._stop()


class Certificates(Callback):
    """Creates what certifies trained weights before figures of them are found.

    It does so as they are evaluated, with a batch that will be scored: once after a fit, and before
    an evaluation alone. Nothing is recorded of weights that keep no promise.
    """

    def __init__(self) -> None:
        self._done = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sees that weights are about to change."""
        self._done = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Certifies them, where this is no validation of a fit.

        Raises:
            CertificateError: If the model keeps no promise of its likelihoods.
        """
        if trainer.state.fn == "validate":
            self._certify(trainer, pl_module, trainer.val_dataloaders)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Certifies them.

        Raises:
            CertificateError: If the model keeps no promise of its likelihoods.
        """
        self._certify(trainer, pl_module, trainer.test_dataloaders)

    def _certify(self, trainer: pl.Trainer, module: pl.LightningModule, loaders: Any) -> None:
        if self._done or not isinstance(module, BaseModule):
            return
        self._done = True
        with (
            torch.inference_mode(mode=False),
            torch.no_grad(),
            torch.random.fork_rng([module.device] if module.device.type == "cuda" else []),
            trainer.precision_plugin.val_step_context(),
        ):
            loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
            batch = next(iter(loader), None)
            if batch is not None:
                batch = trainer.strategy.batch_to_device(batch)
            module.certify(batch)
