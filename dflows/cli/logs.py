"""What a command tells while it runs: lines on the standard error, of the first process alone."""

import logging
import os
import sys
import time
import warnings
from threading import Event, Thread
from typing import Any, Literal, Self, TypeAlias

import pytorch_lightning as pl
from jsonargparse import ArgumentParser
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only

from dflows.provenance import describe_device, versions

__all__ = [
    "LOG",
    "Environment",
    "Heartbeat",
    "Level",
    "add_log_level",
    "in_words",
    "set_log_level",
]

LOG = logging.getLogger("dflows")
"""Where lines of progress go, and what else a command tells."""

Level: TypeAlias = Literal["debug", "info", "warning", "error"]

_LIBRARIES = ("pytorch_lightning", "lightning_fabric")


MINUTE = 60.0


class _Lines(logging.Handler):
    """Creates what writes messages to the standard error of the moment, as lines with the time."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.last = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.last = time.monotonic()
        print(self.format(record), file=sys.stderr, flush=True)


_LINES = _Lines()
LOG.addHandler(_LINES)
LOG.setLevel(logging.INFO)
LOG.propagate = False


def add_log_level(parser: ArgumentParser) -> None:
    """Adds the key `log_level` to the parser of a command."""
    parser.add_argument(
        "--log_level",
        type=Level,
        default="info",
        help="What is told on the standard error, besides errors: debug adds every process and "
        "what Lightning does, warning leaves progress away, error warnings, too.",
    )


def set_log_level(level: Level) -> None:
    """Sets how much a command tells on the standard error.

    Args:
        level: The least level that is told: `debug`, `info`, `warning` or `error`.
    """
    number = getattr(logging, level.upper())
    for logger in (LOG, *map(logging.getLogger, _LIBRARIES)):
        logger.setLevel(number)
    if number > logging.WARNING:
        warnings.simplefilter("ignore")


def in_words(seconds: float) -> str:
    """Returns a duration as people say it, in two units at the most.

    Args:
        seconds: Its seconds.

    Example:
        >>> in_words(42), in_words(3 * 60 + 5), in_words(26 * 3600 + 60)
        ('42 s', '3 min 5 s', '26 h 1 min')
    """
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Heartbeat:
    """Creates what tells that a command still runs, whatever it is at, where it tells nothing else.

    It is a context, so that it ends with the command.
    """

    def __init__(self) -> None:
        self._ended = Event()
        self._thread: Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def start(self, every_seconds: float) -> None:
        """Begins to tell, where the output is no terminal.

        Args:
            every_seconds: Seconds between lines of progress; after twice as many, and after a
                minute, something is amiss. Where there are none, nothing is told.
        """
        if every_seconds and not sys.stdout.isatty():
            _LINES.last = time.monotonic()
            seconds = max(MINUTE, 2 * every_seconds)
            self._thread = Thread(
                target=self._beat, args=(seconds,), name="dflows-heartbeat", daemon=True
            )
            self._thread.start()

    def _beat(self, seconds: float) -> None:
        while not self._ended.wait(max(0.0, _LINES.last + seconds - time.monotonic())):
            silence = time.monotonic() - _LINES.last
            if silence >= seconds:
                _LINES.last = time.monotonic()
                if is_first_process():
                    LOG.info("still running, %s after the last line", in_words(silence))


def is_first_process() -> bool:
    """Says whether this is the one process that tells, as far as is known before all are joined."""
    # Lightning sees the number of the node only once it joins processes.
    return getattr(rank_zero_only, "rank", 0) == 0 and LightningEnvironment().node_rank() == 0


class Environment(Callback):
    """Creates what tells, once, on what a run runs: devices, hosts, precision and versions."""

    def __init__(self) -> None:
        self._told = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells it."""
        self._tell(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells it, where nothing was fitted before."""
        self._tell(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells it likewise."""
        self._tell(trainer)

    def _tell(self, trainer: pl.Trainer) -> None:
        if self._told:
            return
        self._told = True
        if trainer.is_global_zero:
            LOG.info(describe_environment(trainer))
        LOG.debug(
            "process %d, %d on its host %d, has the number %d and %s",
            *(trainer.global_rank, trainer.local_rank, trainer.node_rank),
            *(os.getpid(), trainer.strategy.root_device),
        )


def describe_environment(trainer: pl.Trainer) -> str:
    """Describes on what a trainer runs, on one line."""
    parts: list[Any] = [describe_device(trainer.strategy.root_device, trainer.world_size)]
    if trainer.world_size > 1:
        hosts = f"{trainer.num_nodes} host{'s' if trainer.num_nodes > 1 else ''}"
        strategy = type(trainer.strategy).__name__
        parts.append(f"{trainer.world_size} processes on {hosts}, {strategy}")
    parts += [trainer.precision, ", ".join(f"{name} {one}" for name, one in versions().items())]
    return "; ".join(parts)
