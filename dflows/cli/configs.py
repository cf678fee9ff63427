"""Configurations: shipped ones found by their bare names, and dflows' own defaults."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt
from pytorch_lightning.callbacks import ProgressBar as AnyProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins import CheckpointIO

from datamodules.module import StreamDataModule
from dflows.cli.callbacks import Certificates, SaveRun, Stopwatch, plain_config
from dflows.cli.checkpoints import Checkpoint, WholeCheckpoints, read_checkpoint
from dflows.cli.folders import RunFolder
from dflows.cli.logs import Heartbeat, add_log_level, set_log_level
from dflows.cli.progress import ProgressBar, ProgressLines
from dflows.cli.recording import below_here
from dflows.cli.saving import BestCheckpoint, LastCheckpoint
from dflows.cli.slurm import run_of_job
from dflows.cli.stopping import StopBetweenSteps
from dflows.cli.summary import EXACT_STATES
from dflows.cli.trainer import Trainer
from dflows.cli.yaml_files import read_yaml
from dflows.errors import UserError
from dflows.memory import bounded
from dflows.records import check_folder, check_name
from lightning_modules import BaseModule
from lightning_modules.checkpoints import load_weights, match_precision, start_weights

__all__ = ["FlowCLI", "Parser", "check_seed", "resolved_arguments", "shipped_configs"]

DEFAULTS: dict[str, Any] = {
    # The training stream has no end: a run is as long as max_steps or max_time say.
    "max_epochs": -1,
    "max_steps": -1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 1000,
    "log_every_n_steps": 50,
    "gradient_clip_val": 1.0,
    "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": None}},
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
"""The defaults of dflows where they differ from Lightning's; every one is a key to change."""


def shipped_configs() -> Traversable:
    """Returns the folder of shipped configurations, installed or in the checkout."""
    try:
        return files("dflows.configs")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "configs"


def _names(folder: Traversable, prefix: str = "") -> Iterator[str]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _names(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name


@contextmanager
def resolved_arguments(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Replaces the bare names of shipped configurations by the paths of their files.

    Args:
        arguments: The arguments of a command.

    Yields:
        The arguments, whose files are there while the context lasts.

    Raises:
        UserError: If a configuration is neither a file nor shipped.
    """
    resolved: list[str] = []
    with ExitStack() as stack:
        expected = False
        for argument in arguments:
            flag, equals, value = argument.partition("=")
            if expected:
                flag, equals, value = "", "", argument
            elif flag not in ("-c", "--config") or not equals:
                resolved.append(argument)
                expected = argument in ("-c", "--config")
                continue
            resolved.append(f"{flag}{equals}{_find(value, stack)}")
            expected = False
        yield resolved


def _find(name: str, stack: ExitStack) -> str:
    path = Path(name)
    if path.is_file():
        _check_readable(path)
        return name
    shipped = shipped_configs()
    names = list(_names(shipped))
    bare = name.removeprefix("configs/")
    if path.exists() or path.is_absolute() or bare not in names:
        raise UserError(
            f"no configuration {name}: give a file, or one of the shipped {', '.join(names)}"
        )
    return str(stack.enter_context(as_file(shipped.joinpath(bare))))


def _check_readable(path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise UserError(f"{path} begins with a byte order mark: save it as plain UTF-8")
        content = read_yaml(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: save it as text") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys: a configuration is a mapping of keys to values")


def _num_classes(data: StreamDataModule) -> int:
    return data.num_classes


def _length(data: StreamDataModule) -> int:
    # Counting refuses a window that is longer than the text, before a network is made for it.
    data.class_counts()
    return data.length


LINKED: dict[str, Callable[[StreamDataModule], int]] = {
    "num_classes": _num_classes,
    "length": _length,
}
"""Keys of the model, and of a flow that it is given, that are those of the data."""

SEEDS = 2**32

PLACES = ("model.init_args", "model.init_args.flow.init_args")


def check_seed(key: str, seed: int) -> None:
    """Refuses what not all generators take as a seed.

    Args:
        key: What the seed is called.
        seed: The seed.

    Raises:
        argparse.ArgumentError: If it is not from 0 to below 2**32.
    """
    if not 0 <= seed < SEEDS:
        raise argparse.ArgumentError(None, f"{key} is {seed}: give a number from 0 to {SEEDS - 1}")


def _folder_of_run(checkpoint: Path) -> Path | None:
    """Returns the folder of the run that a checkpoint lies in, unless it was taken out of it."""
    folder = checkpoint.absolute().parent
    whole = (folder / "config.yaml").is_file() and len(folder.parents) > 1
    return folder if whole else None


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Yields the numbers in a configuration that have a fraction, with their keys."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, (Namespace, dict)):
        for name, entry in (vars(value) if isinstance(value, Namespace) else value).items():
            yield from _numbers(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            yield from _numbers(entry, f"{key}.{number}")


class Parser(LightningArgumentParser):
    """Creates a parser that takes whole names, and raises errors where others print their usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "exit_on_error": False, "allow_abbrev": False})

    def add_function_arguments(
        self, *args: Any, linked_targets: Any = None, **kwargs: Any
    ) -> list[str]:
        """Leaves away what links give, as it is done for classes, and functions refuse."""
        added: list[str] = super().add_function_arguments(*args, **kwargs)
        return added


class FlowCLI(LightningCLI):
    """Creates trainer, model and data from configurations and arguments.

    Args:
        arguments: The arguments of the command. Processes that Lightning starts read `sys.argv`,
            which must hold them too.
        stop: What listens to signals.
        heartbeat: What tells that the command still runs, to be started with it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        stop: StopBetweenSteps | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.arguments = list(arguments)
        self.stop = stop or StopBetweenSteps()
        self._heartbeat = heartbeat
        program, *given = sys.argv
        with resolved_arguments(self.arguments) as resolved:
            # LightningCLI takes arguments from there alone without a warning.
            sys.argv = [program, *resolved]
            try:
                super().__init__(
                    BaseModule,
                    StreamDataModule,
                    save_config_callback=SaveRun,
                    trainer_class=Trainer,
                    trainer_defaults=DEFAULTS,
                    seed_everything_default=0,
                    parser_class=Parser,
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    run=False,
                    auto_configure_optimizers=False,
                    # Checkpoints say themselves how their module is made.
                    load_from_checkpoint_support=False,
                    parser_kwargs={"prog": "python -m dflows.fit"},
                )
            finally:
                sys.argv = [program, *given]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the keys that dflows has in addition to Lightning's."""
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to resume from, exactly; or the folder of a run, for its last.ckpt.",
        )
        parser.add_argument(
            "--start",
            type=str | None,
            default=None,
            help="Checkpoint, or folder of a run, whose weights a new run starts with.",
        )
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the run and of its record; by default that of the first configuration.",
        )
        parser.add_argument(
            "--record", type=str | None, default=None, help="Folder that gets the record as well."
        )
        parser.add_argument(
            "--budget", type=str, default="", help="What the run was allowed, for the record."
        )
        parser.add_argument(
            "--exact_states",
            type=NonNegativeInt,
            default=EXACT_STATES,
            help="Sum the likelihood of a known distribution over all of up to so many states.",
        )
        parser.add_argument(
            "--archive",
            type=bool,
            default=False,
            help="Encode the test split and decode it, as a proof of its likelihood.",
        )
        add_log_level(parser)
        parser.add_lightning_class_args(ProgressBar, "progress_bar")
        parser.add_lightning_class_args(ProgressLines, "progress_lines")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        for key, read in LINKED.items():
            for place in PLACES:
                parser.link_arguments("data", f"{place}.{key}", read, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and refuses a seed that no generator takes, before one is asked for it."""
        super().parse_arguments(parser, args)
        if not isinstance(self.config.seed_everything, bool):
            check_seed("seed_everything", self.config.seed_everything)

    def before_instantiate_classes(self) -> None:
        """Sets the folder of the run: a new one, or that of the resumed run."""
        config = self.config
        set_log_level(config.log_level)
        if self._heartbeat is not None and config.trainer.enable_progress_bar is not False:
            self._heartbeat.start(config.progress_lines.every_seconds)
        if config.name is None:
            config.name = self._default_name()
        self._check_config()
        self._resumed: Checkpoint | None = None
        self._requeued_folder = run_of_job(self._parent_of_runs(), self.arguments)
        self._resumed_folder = folder = self._requeued_folder
        if folder is not None:
            kept = Path(config.last_checkpoint.dirpath or folder)
            last = kept / f"{config.last_checkpoint.filename}.ckpt"
            config.ckpt_path = str(last) if last.is_file() else config.ckpt_path
        if config.ckpt_path is not None:
            self._resumed = read_checkpoint(config.ckpt_path, ("last.ckpt", "best.ckpt"))
            config.ckpt_path = str(self._resumed.path)
            self._resumed_folder = folder = folder or _folder_of_run(self._resumed.path)
            self._check_seed(self._resumed)
        for logger in self._loggers():
            if folder is not None and str(logger.class_path).endswith("TensorBoardLogger"):
                logger.init_args.save_dir = str(below_here(folder.parents[1]))
                logger.init_args.name = folder.parent.name
                logger.init_args.version = folder.name
            elif logger.get("init_args.name", "") is None:
                logger.init_args.name = config.name

    def _loggers(self) -> list[Namespace]:
        """Returns the settings of all loggers."""
        given = self.config.trainer.logger
        loggers = given if isinstance(given, list) else [given]
        return [logger for logger in loggers if isinstance(logger, Namespace)]

    def _parent_of_runs(self) -> Path:
        """Returns a folder that all runs of the first logger lie in."""
        given = next((logger.get("init_args.save_dir") for logger in self._loggers()), None)
        return Path(given or Path(self.config.trainer.default_root_dir or "") / "runs")

    def _check_config(self) -> None:
        """Refuses what would spoil a run when it is over."""
        config = self.config
        check_name("--name", config.name)
        if config.record is not None:
            check_folder(config.record)
        if config.seed_everything is False:
            raise UserError(
                "seed_everything is false, and a record names the seed of its run: give a number, "
                "or true for any"
            )
        if config.trainer.enable_checkpointing is False:
            raise UserError(
                "trainer.enable_checkpointing is false, and the best checkpoint is what is tested: "
                "leave it away, and set last_checkpoint.every_n_train_steps to write fewer"
            )

        for key in ("best_checkpoint.filename", "last_checkpoint.filename"):
            name = config.get(key)
            if name != Path(name).name:
                raise UserError(f"{key} is {name!r}: give a name; dirpath is for another folder")
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            for key in ("name", "version", "sub_dir"):
                name = logger.get(f"init_args.{key}") if isinstance(logger, Namespace) else None
                if isinstance(name, str) and (".." in Path(name).parts or Path(name).is_absolute()):
                    raise UserError(
                        f"trainer.logger.init_args.{key} is {name!r}, which leaves the folder of "
                        "all runs: give a name, and the folder as save_dir"
                    )
        for key, value in _numbers(config, ""):
            if math.isnan(value):
                raise UserError(f"{key} is not a number ({value}): give one")

    def _check_seed(self, resumed: Checkpoint) -> None:
        """Refuses another seed, which could not be applied: random states are resumed."""
        seed, before = self.config.seed_everything, resumed.config.get("seed_everything")
        if before is not None and seed != before:
            raise UserError(
                f"seed_everything is {seed}, and the run that goes on from {resumed.path} draws "
                f"from {before}: give that, or begin a new run"
            )

    def _default_name(self) -> str:
        given = self.config.config or []
        return Path(str(given[0])).stem if given and given[0] else "dflows"

    def instantiate_classes(self) -> None:
        """Makes the classes, and sees whether they fit each other and a checkpoint.

        Raises:
            UserError: If the model was given what it takes from the data, and it differs; if it
                takes more than the memory; or if the checkpoint to resume or to start from is of
                another vocabulary or model.
        """
        asked = {
            f"{place}.{key}": self.config.get(f"{place}.{key}")
            for place in PLACES
            for key in LINKED
        }
        with bounded("what is made", "give smaller numbers"):
            super().instantiate_classes()
        for place, value in asked.items():
            own = getattr(self.datamodule, place.rpartition(".")[2])
            if value not in (None, own):
                raise UserError(
                    f"{place} is {value}, and the data have {own}: leave it away, the model takes "
                    "it from the data"
                )
        if self._resumed is not None:
            self.datamodule.check_length(self._resumed.length)
            self.datamodule.check_vocabulary(self._resumed.vocabulary)
            load_weights(self.model, self._resumed.weights, self._resumed.path)
            self._resumed = None
        elif self.config.start is not None:
            start = read_checkpoint(self.config.start)
            self.datamodule.check_length(start.length)
            self.datamodule.check_vocabulary(start.vocabulary)
            match_precision(self.model, start.weights)
            start_weights(self.model, start.weights, start.path)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Adds what keeps checkpoints whole, and measures."""
        plugins = self.config_init.trainer.plugins or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeCheckpoints())
        self._drop_progress_bar()
        trainer = super().instantiate_trainer(plugins=plugins, **kwargs)
        self.stopwatch = Stopwatch()
        given = self.config.ckpt_path
        checkpoint = None if given is None else Path(given)
        self.folder = RunFolder(
            self.config.name,
            self._resumed_folder,
            checkpoint,
            self.arguments,
            requeued=self._requeued_folder is not None,
        )
        first = [self.stop, self.folder, Certificates(), self.stopwatch]
        # Behind what lets processes fail together, whatever fails.
        trainer.callbacks[1:1] = first  # type: ignore[attr-defined]
        return trainer

    def _drop_progress_bar(self) -> None:
        """Leaves dflows' bar away where the user wants none, or has one of another kind."""
        settings = self.config_init.trainer
        callbacks = settings.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        own = any(isinstance(callback, AnyProgressBar) for callback in callbacks)
        keys = self.parser.callback_keys
        unwanted = ["progress_bar"] if own else []
        if settings.enable_progress_bar is False:
            unwanted = ["progress_bar", "progress_lines"]
        self.parser.callback_keys = [key for key in keys if key not in unwanted]

    def resolved_config(self) -> dict[str, Any]:
        """Returns the resolved configuration in plain types."""
        return plain_config(self.parser, self.config, self.model, self.datamodule)
