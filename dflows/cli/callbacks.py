"""Callbacks of every run: its configuration, the clock, certificates."""

import inspect
import pkgutil
import time
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import Namespace
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.cli import SaveConfigCallback

from datamodules.module import StreamDataModule
from dflows.cli.checkpoints import describe_run
from dflows.cli.folders import run_folder
from dflows.files import make_folder, write_text
from dflows.reporting import Report
from lightning_modules import BaseModule
from lightning_modules.checkpoints import KEY

__all__ = ["Certificates", "SaveRun", "Stopwatch", "plain_config"]


class SaveRun(SaveConfigCallback):
    """Creates what saves config.yaml and tokenizer.json with the checkpoints, and in them.

    Nothing is written before all checks have passed and training begins.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "overwrite": True})
        self._description: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Waits for :meth:`on_train_start`."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes config.yaml and tokenizer.json."""
        self._description = None  # Lightning's finders may have saved with what they tried
        folder, data = run_folder(trainer), trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or folder is None:
            return
        make_folder(folder)
        config = used_config(self.config, pl_module, data)
        text = self.parser.dump(config, skip_none=False, format="yaml")
        write_text(folder / self.config_filename, text)
        data.save_vocabulary(folder)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds a description of the model to the checkpoint."""
        if self._description is None:
            data = trainer.datamodule  # type: ignore[attr-defined]
            config = plain_config(self.parser, self.config, pl_module, data)
            self._description = describe_run(config, data.vocabulary.to_json(), data.length)
        checkpoint[KEY] = self._description


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
