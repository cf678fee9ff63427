"""The folder of a run, which no other run works in."""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from dflows.cli.saving import KeptCheckpoint
from dflows.cli.slurm import note_job
from dflows.errors import UserError
from dflows.files import make_folder, named

__all__ = ["RunFolder", "new_version", "run_folder"]

OPENED = ("events.out.", "hparams.yaml")
"""What files that a logger opens begin with, before anything is logged."""


def new_version(parent: Path) -> Path:
    """Makes the folder of the next version, which no other process was given.

    Args:
        parent: The folder of all versions.

    Raises:
        UserError: If it cannot be made.
    """
    make_folder(parent)
    while True:
        names = [path.name.removeprefix("version_") for path in parent.glob("version_*")]
        number = max((int(name) + 1 for name in names if name.isdecimal()), default=0)
        folder = parent / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:  # another process was quicker
            continue
        except OSError as error:
            raise named(folder, error) from error
        return folder


class _Lock:
    """Creates what keeps other processes out of a folder for as long as this one lives.

    Args:
        folder: The folder.

    Raises:
        UserError: If another process is in it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.with_name(f".{folder.name}.lock")
        self._file: IO[str] | None = None
        try:
            import fcntl
        except ImportError:  # not a system that has such locks
            return
        while self._file is None:
            try:
                file = self._path.open("a+", encoding="utf-8")
            except OSError as error:
                raise named(self._path, error) from error
            try:
                # It ends with the process, however that ends, and is not inherited.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                owner = file.read().strip()
                file.close()
                if not isinstance(error, (BlockingIOError, PermissionError)):
                    return  # a file system without locks
                raise UserError(
                    f"another run ({owner or 'a process'}) is at work in {folder}: wait until it "
                    "has ended, or begin a run in a folder of its own"
                ) from None
            if self._path.exists() and os.path.samestat(self._path.stat(), os.fstat(file.fileno())):
                self._file = file
            else:  # the one who held it has removed it
                file.close()
        with suppress(OSError):  # a full disk
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()

    def release(self) -> None:
        """Releases the lock."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            with suppress(OSError):
                self._file.close()
            self._file = None


class RunFolder(Callback):
    """Creates what settles the folder of a run: the logger's, or one of its own.

    Args:
        name: Name of the run.
        resumed: The folder of the run that this one continues, if it is one.
        checkpoint: The checkpoint that it resumes from.
        command: The arguments of the command, by which a requeued job finds its run.
        requeued: Whether this is such a job, which goes on in the folder whatever its loggers do.
    """

    def __init__(
        self,
        name: str,
        resumed: Path | None = None,
        checkpoint: Path | None = None,
        command: Sequence[str] = (),
        *,
        requeued: bool = False,
    ) -> None:
        self.name = name
        self.resumed = resumed
        self.checkpoint = checkpoint
        self.command = command
        self.requeued = requeued
        self.path: Path | None = None
        self._lock: _Lock | None = None
        self._by_itself = True

    def claim(self, trainer: pl.Trainer) -> None:
        """Makes the folder, or keeps others out of the one that is gone on with, until it is left.

        Processes that something else started, torchrun or srun, would wait for one that fails
        before all have joined: they claim it afterwards.

        Raises:
            UserError: If it cannot be made, or another run is at work in it.
        """
        self._by_itself = False
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if environment is None or not environment.creates_processes_externally:
            self._claim(trainer)

    def _claim(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        self.path = self._find(trainer).absolute()
        make_folder(self.path)
        self._lock = _Lock(self.path)

    def leave(self) -> None:
        """Releases the lock, and removes a folder that has nothing but a logger's empty files."""
        if self._lock is None or self.path is None:
            return
        self._lock.release()
        files = list(self.path.iterdir()) if self.path.is_dir() else []
        if any(file.is_dir() or not file.name.startswith(OPENED) for file in files):
            return
        with suppress(OSError):  # as far as they are empty
            for file in files:
                file.unlink()
            for empty in (self.path, *self.path.parents[:2]):
                empty.rmdir()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Claims the folder, if that is still to do; all processes share it, and checkpoints."""
        if self.path is None:
            self._claim(trainer)
        found = None if self.path is None else str(self.path)
        self.path = Path(str(trainer.strategy.broadcast(found)))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, KeptCheckpoint):
                callback.dirpath = callback.dirpath or str(self.path)
                if self.checkpoint is not None:
                    callback.resumed_from = self.checkpoint.absolute().parent

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the folder, where nobody else does."""
        if self._by_itself:
            self.leave()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leaves it likewise."""
        if self._by_itself:
            self.leave()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes which job of SLURM works in the folder."""
        if trainer.is_global_zero and self.path is not None:
            note_job(self.path, self.command)

    def _find(self, trainer: pl.Trainer) -> Path:
        logger = trainer.logger
        if self.resumed is not None and (self.requeued or logger is None):
            return self.resumed
        if isinstance(logger, (TensorBoardLogger, CSVLogger)):
            if logger._version is None:
                # Not a number that the logger finds free: two that look at once find the same.
                found = new_version(Path(logger.root_dir).expanduser())
                logger._version = int(found.name.removeprefix("version_"))
            return Path(logger.log_dir)
        save_dir, name, version = None, None, None
        if logger is not None:
            save_dir, name, version = logger.save_dir, logger.name, logger.version
        parent = Path(save_dir or Path(trainer.default_root_dir) / "runs") / (name or self.name)
        if version is None:
            return new_version(parent)
        return parent / (version if isinstance(version, str) else f"version_{version}")


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Returns the folder of a trainer's run, once it is set up."""
    found = (entry for entry in trainer.callbacks if isinstance(entry, RunFolder))  # type: ignore[attr-defined]
    folder = next(found, None)
    return None if folder is None else folder.path
