"""Callbacks of every run: progress, checkpoints, the run's folder, the clock."""

import inspect
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from pytorch_lightning.cli import SaveConfigCallback

from datamodules.module import StreamDataModule
from dflows.cli.checkpoints import KEY, describe_run
from lightning_modules import BaseModule

__all__ = ["BestCheckpoint", "LastCheckpoint", "ProgressBar", "SaveRun", "Stopwatch"]


class ProgressBar(RichProgressBar):
    """Creates a bar over all steps, with the bits per character beside it.

    Where the entropy of the data is known, it shows nats per example, and the entropy as the floor.

    Arguments:
        refresh_rate: Batches from one update to the next; 0 shows no bar.
        leave: Whether finished bars stay.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    @property
    def total_train_batches(self) -> int | float:
        """The batches of the whole run, where the run is as long as its steps say."""
        steps = self.trainer.max_steps
        if steps > 0 and self.trainer.max_epochs == -1:
            return steps * self.trainer.accumulate_grad_batches
        return super().total_train_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """Returns the metrics without the version of the run."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.entropy is not None:
            nats = {
                name.replace("bpc", "nats"): value * math.log(2) * data.length
                for name, value in metrics.items()
                if name in ("train_bpc", "valid_bpc") and isinstance(value, float)
            }
            metrics = {**nats, "floor": data.entropy}
        return metrics


class _Checkpoint(ModelCheckpoint):
    """Creates checkpoints in the folder of the run, under one name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            save_top_k=1, auto_insert_metric_name=False, enable_version_counter=False, **kwargs
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the folder, which the logger's is."""
        if self.dirpath is None and trainer.log_dir is not None:
            self.dirpath = str(Path(trainer.log_dir).absolute())
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the best so far, which in another folder is none."""
        if state_dict["dirpath"] == self.dirpath:
            super().load_state_dict(state_dict)

    def _ModelCheckpoint__warn_if_dir_not_empty(self, dirpath: str) -> None:  # noqa: N802
        """Keeps quiet: a resumed run goes on in its folder."""


class BestCheckpoint(_Checkpoint):
    """Creates the checkpoint of the best validation.

    Arguments:
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
    """Creates the checkpoint to go on from: after every validation, at the end and on failure.

    Arguments:
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
        """Saves where the run is, if it has got anywhere."""
        if trainer.global_step:
            super().on_exception(trainer, pl_module, exception)

    @property
    def state_key(self) -> str:
        """The same for all intervals, so that a resumed run may change its own."""
        return type(self).__name__


class SaveRun(SaveConfigCallback):
    """Creates what puts config.yaml and tokenizer.json beside the checkpoints, and into them.

    Nothing is written before all checks have passed and training begins.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "overwrite": True})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Waits for :meth:`on_train_start`."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes config.yaml and tokenizer.json."""
        super().setup(trainer, pl_module, "fit")
        folder = trainer.log_dir  # which all processes have to ask for
        if trainer.is_global_zero and folder is not None:
            trainer.datamodule.save_vocabulary(folder)  # type: ignore[attr-defined]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Makes the checkpoint say what it is."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        config = plain_config(self.parser, self.config, pl_module, data)
        checkpoint[KEY] = describe_run(config, data.vocabulary.to_json(), data.length)


def plain_config(
    parser: Any, config: Any, module: pl.LightningModule, data: StreamDataModule
) -> dict[str, Any]:
    """Returns a resolved configuration in plain types, with what was linked written out."""
    plain: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_none=False, format="yaml"))
    accepted = inspect.signature(type(module)).parameters
    linked = {"num_classes": data.num_classes, "length": data.length}
    arguments = plain["model"].setdefault("init_args", {})
    arguments.update({key: value for key, value in linked.items() if key in accepted})
    return plain


class Stopwatch(Callback):
    """Creates a clock of training without its validations, and of evaluation.

    A resumed run goes on counting, as its steps do.
    """

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self.train_characters = 0
        self.train_examples = 0
        self.test_seconds = 0.0
        self._since: float | None = None

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

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts, and asks for the last validation when the last step is done."""
        indices = BaseModule.indices_of(batch)
        self.train_characters += indices.numel() * trainer.world_size
        self.train_examples += len(indices) * trainer.world_size
        if 0 < trainer.max_steps <= trainer.global_step:
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
