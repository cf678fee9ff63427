"""The checkpoints that a run keeps: the best, and the last to resume from."""

import shutil
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from dflows.cli.loops import FitLoop
from dflows.cli.together import stops_together
from dflows.errors import NonFiniteError, UserError, chain_of
from dflows.files import atomic_write, make_folder

__all__ = ["BestCheckpoint", "KeptCheckpoint", "LastCheckpoint"]


def _loop(trainer: pl.Trainer) -> FitLoop:
    return cast("FitLoop", trainer.fit_loop)


class KeptCheckpoint(ModelCheckpoint):
    """Creates checkpoints in the folder of the run, under one name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            save_top_k=1, auto_insert_metric_name=False, enable_version_counter=False, **kwargs
        )
        self.resumed_from: Path | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the best so far, wherever its folder has come to lie."""
        kept = state_dict.get("best_model_path")
        if kept and Path(kept) != Path(self.dirpath or "") / f"{self.filename}.ckpt":
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
        """Returns the current path of a checkpoint: next to the resumed one, if moved.

        What a stranger's checkpoint calls its best is no other file than one of that name.
        """
        if kept.name != f"{self.filename}.ckpt":
            return None
        moved = None if self.resumed_from is None else self.resumed_from / kept.name
        return next((path for path in (moved, kept) if path and path.is_file()), None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Brings the best so far into the folder of the run."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and self.dirpath is not None:
            make_folder(Path(self.dirpath))
        best = self.best_model_path
        if self.monitor is None or not best or self.dirpath is None:
            return
        here = Path(self.dirpath) / Path(best).name
        if here == Path(best) or not Path(best).is_file():
            return
        if trainer.is_global_zero:
            with atomic_write(here, f".{here.name}.tmp") as unfinished:
                shutil.copyfile(best, unfinished)
        self.best_model_path = self.kth_best_model_path = str(here)
        self.best_k_models = {str(here): score for score in self.best_k_models.values()}

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Saves, into the folder of the run as long as there is one.

        Raises:
            UserError: If it is gone.
        """
        if trainer.is_global_zero and not Path(filepath).parent.is_dir():
            raise UserError(
                f"the folder {Path(filepath).parent} is gone, and with it what the run has kept: "
                "put it back and resume from its last.ckpt, or begin a new run"
            )
        super()._save_checkpoint(trainer, filepath)

    def _ModelCheckpoint__warn_if_dir_not_empty(self, dirpath: str) -> None:  # noqa: N802
        """Keeps quiet: a resumed run stays in its folder."""


class BestCheckpoint(KeptCheckpoint):
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
        super().__init__(
            monitor=monitor,
            mode=mode,
            dirpath=dirpath,
            filename=filename,
            # A resumed run does not know what came of the validation before.
            save_on_train_epoch_end=False if monitor.startswith("valid") else None,
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves, if it is the best."""
        _loop(trainer).validated()
        super().on_validation_end(trainer, pl_module)


class LastCheckpoint(KeptCheckpoint):
    """Creates the checkpoint to resume from: after every validation, at the end and on failure.

    It is written between two steps, when all that belongs to the first is done. A run that fails
    within a step, and has changed something by then, keeps the checkpoint that was written before.

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
        self._due = self._trained = False
        self._changed_in = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves what was trained before, if it is due."""
        if batch_idx % trainer.accumulate_grad_batches:
            # Gradients of batches before, to which this one's are added, are not taken back.
            self._change(trainer)
        elif self._due:
            self._save(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Sees that the weights are about to change."""
        self._change(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Sees whether it is due: when all others are done with this step."""
        self._trained = True
        self._change(trainer)
        every = self._every_n_train_steps
        self._due |= every > 0 and trainer.global_step % every == 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sees whether it is due: when all others are done with this validation."""
        _loop(trainer).validated()
        self._due |= not self._every_n_train_steps

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sees that it is due."""
        self._due |= not self._every_n_train_steps

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves."""
        self._save(trainer)

    def _change(self, trainer: pl.Trainer) -> None:
        self._changed_in = trainer.fit_loop.total_batch_idx

    def _save(self, trainer: pl.Trainer) -> None:
        self._due = False
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Saves where the run is, if it can go on from there and has not diverged."""
        diverged = any(isinstance(cause, NonFiniteError) for cause in chain_of(exception))
        exact = _loop(trainer).whole or self._changed_in != trainer.fit_loop.total_batch_idx
        if not (self.save_on_exception and self._trained and exact) or diverged:
            return
        if not stops_together(trainer):
            return
        try:
            self._save(trainer)
        except UserError as error:
            # The disk that is full may be what ends the run.
            if not isinstance(exception, UserError):
                raise error from exception

    @property
    def state_key(self) -> str:
        """The same for all intervals, so that a resumed run may change its own."""
        return type(self).__name__
