"""How modules are optimized: AdamW, its schedule, and no step that is not finite."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.plugins import DoublePrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dflows.backbones import Backbone
from dflows.errors import UserError
from lightning_modules.divergence import FiniteWatch, all_finite, located
from lightning_modules.optimization import (
    DEFAULT_OPTIMIZATION,
    Optimization,
    Schedule,
    keep_settings,
)
from lightning_modules.sharding import full, part_like

__all__ = ["OptimizedModule"]


class OptimizedModule(pl.LightningModule):
    """A module with dflows' optimizer and schedule.

    Args:
        optimization: Settings of the optimizer.
    """

    def __init__(self, optimization: Optimization = DEFAULT_OPTIMIZATION) -> None:
        super().__init__()
        self.optimization = optimization
        self._watch = FiniteWatch()
        self._roles: list[tuple[bool, bool]] = []
        self._rates_changed = False
        self._gradients: dict[str, Tensor] = {}

    def base_parameters(self) -> Iterable[nn.Parameter]:
        """Returns the parameters that have `base_learning_rate` and are held at first."""
        return ()

    def configure_optimizers(self) -> Any:
        """Returns AdamW with groups for matrices, for what does not decay, and for the base.

        Where there is nothing to train by gradients there is no optimizer.
        """
        settings = self.optimization
        base = {id(parameter) for parameter in self.base_parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        seen: set[int] = set()
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen or not parameter.requires_grad:
                    continue
                seen.add(id(parameter))
                decays = (
                    "weight" in name and parameter.ndim > 1 and not isinstance(module, nn.Embedding)
                )
                groups.setdefault((id(parameter) in base, decays), []).append(parameter)
        if not groups:
            return None
        roles = list(groups)
        optimizer = torch.optim.AdamW(
            [
                {"params": groups[role], **settings_of}
                for role, settings_of in zip(roles, self._settings(roles), strict=True)
            ],
            # One kernel for all parameters; where Lightning clips it cannot under mixed precision.
            fused=self._clips(self.trainer.gradient_clip_algorithm)
            or not ("mixed" in self.trainer.precision and self.trainer.gradient_clip_val),
        )
        keep_settings(optimizer, lambda: self._settings(roles))
        if settings.schedule != "constant" and not self.has_end:
            raise UserError(
                f"optimization.schedule is {settings.schedule} and the training has no end: "
                "set trainer.max_steps or trainer.max_time"
            )
        if settings.schedule != "constant" and self.coarse_epochs == 1:
            raise UserError(
                f"optimization.schedule is {settings.schedule}, and the one epoch that trains has "
                "no known length: set trainer.max_steps, max_time or limit_train_batches"
            )
        self._roles = roles
        schedule = Schedule(
            optimizer, lambda step: self.optimization.factor(step, self.progress(step))
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "learning_rate"},
        }

    def _settings(self, roles: Sequence[tuple[bool, bool]]) -> list[dict[str, Any]]:
        """Returns the settings of the optimizer's groups: of the base or not, decaying or not."""
        settings = self.optimization
        return [
            {
                "lr": (in_base and settings.base_learning_rate) or settings.learning_rate,
                "weight_decay": settings.weight_decay if decays else 0.0,
                "betas": settings.betas,
            }
            for in_base, decays in roles
        ]

    def _schedules(self) -> list[Schedule]:
        configs = [] if self._trainer is None else self.trainer.lr_scheduler_configs
        return [entry.scheduler for entry in configs if isinstance(entry.scheduler, Schedule)]

    @property
    def learning_rate(self) -> float:
        """The learning rate after the warm-up, which a learning-rate finder sets."""
        return self.optimization.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.optimization = replace(self.optimization, learning_rate=value)
        for schedule in self._schedules():
            schedule.rebase([group["lr"] for group in self._settings(self._roles)])
            # A finder gives all groups the plain rate after this.
            self._rates_changed = True

    def _total_steps(self) -> float:
        # Where the length of an epoch is not known, Lightning returns max_steps, which is -1.
        steps = self.trainer.estimated_stepping_batches
        return steps if steps > 0 else math.inf

    def _timer(self) -> Timer | None:
        timers = (entry for entry in self.trainer.callbacks if isinstance(entry, Timer))  # type: ignore[attr-defined]
        return next(timers, None)

    @property
    def _end_is_known(self) -> bool:
        return not math.isinf(self._total_steps()) or self._timer() is not None

    @property
    def has_end(self) -> bool:
        """Whether the training ends by steps, by epochs or by time."""
        return self._end_is_known or self.coarse_epochs is not None

    @property
    def coarse_epochs(self) -> int | None:
        """The number of epochs, where it alone tells the progress: none has a known length."""
        epochs = self.trainer.max_epochs or -1
        return None if self._end_is_known or epochs < 1 else epochs

    def progress(self, step: int) -> float:
        """Returns the part of the training that is done after so many steps, or by time, 0 to 1.

        All processes must ask at once.
        """
        total, epochs = self._total_steps(), self.trainer.max_epochs or -1
        progress = step / total
        if math.isinf(total) and epochs > 0:
            progress = self.trainer.current_epoch / epochs
        timer = self._timer()
        if timer is not None and timer._duration is not None:
            # The clock is read once: between two readings a busy machine may let any time pass.
            elapsed = timer.time_elapsed() / max(timer._duration, 1e-9)
            if self.trainer.world_size > 1:
                # Clocks differ, and learning rates must not.
                elapsed = self.trainer.strategy.broadcast(elapsed)
            progress = max(progress, elapsed)
        return min(max(progress, 0.0), 1.0)

    def setup(self, stage: str) -> None:
        """Sets how a step is computed.

        Raises:
            UserError: If there are no steps, or no backbone can compute them so.
        """
        if stage != "fit":
            return
        if self.trainer.max_steps == 0:
            raise UserError("trainer.max_steps is 0: give at least 1, or -1 for no such end")
        if self.trainer.max_epochs == 0:
            raise UserError("trainer.max_epochs is 0: give at least 1, or -1 for no such end")
        if isinstance(self.trainer.precision_plugin, DoublePrecision):
            self.double()  # Lightning does so when weights of a checkpoint have been rounded
        backbones = [part for part in self.modules() if isinstance(part, Backbone)]
        able = [backbone for backbone in backbones if backbone.checkpoints_gradients]
        names = ", ".join(sorted({backbone.display_name for backbone in backbones})) or "none"
        if self.optimization.compile and not backbones:
            raise UserError(
                "optimization.compile is set, and the model has no backbone that could be "
                "compiled: leave it away"
            )
        if self.optimization.gradient_checkpointing and not able:
            raise UserError(
                "optimization.gradient_checkpointing is set, and no backbone of the model has "
                f"layers that could be computed again ({names}): leave it away, or choose a "
                "Transformer or convolutions"
            )
        for backbone in able:
            backbone.gradient_checkpointing = self.optimization.gradient_checkpointing

    def on_train_epoch_start(self) -> None:
        """Puts learning rates right that a finder has set."""
        if self._rates_changed:
            self._rates_changed = False
            for schedule in self._schedules():
                schedule.apply()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds gradients that wait for those of more batches, of each process."""
        trainer = self.trainer
        batches = trainer.fit_loop.epoch_loop.batch_progress.state_dict()
        waiting = batches["current"]["processed"] % trainer.accumulate_grad_batches
        if waiting and not batches["is_last_batch"]:
            checkpoint["gradients"] = {
                name: self._of_each_process(parameter.grad)
                for name, parameter in self.named_parameters()
                if parameter.grad is not None
            }

    def _of_each_process(self, gradient: Tensor) -> Any:
        """Returns the gradients of all processes, or the one that is their mean already."""
        mean = full(gradient)
        alone = self.trainer.world_size == 1 or mean is not gradient
        return mean.unsqueeze(0) if alone else self.all_gather(gradient)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what :meth:`on_save_checkpoint` added."""
        self._gradients = checkpoint.get("gradients", {})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Gives the parameters of a resumed run the gradients that waited."""
        for name, parts in self._gradients.items():
            parameter = self.get_parameter(name)
            # Those of all processes are averaged: before the step, or at once where each holds a
            # part of the parameter.
            own = len(parts) == self.trainer.world_size and not isinstance(parameter, DTensor)
            gradient = parts[self.global_rank] if own else parts.mean(dim=0)
            parameter.grad = part_like(gradient.to(parameter.dtype), parameter)
        self._gradients = {}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Holds the base in the first steps."""
        if self.trainer.global_step < self.optimization.hold_base_steps:
            for parameter in self.base_parameters():
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips gradients, and checks that they are finite.

        Raises:
            NonFiniteError: If they are not.
        """
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if gradient_clip_val and self._clips(gradient_clip_algorithm):
            # As Lightning does it, but the norm that this takes is looked at.
            norm = full(nn.utils.clip_grad_norm_(parameters, gradient_clip_val))
            finite = norm.isfinite()
        else:
            finite = all_finite([parameter.grad for parameter in parameters])
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        scale = None if self._scaler is None else self._scaler._get_scale_async()
        if scale is not None:
            # A loss that is scaled up for float16 overflows at times: its scaler skips the step,
            # and scales less. It has not diverged before there is nothing left to scale less.
            finite = finite | (scale > 1)
        if parameters and not self._in_range_test():
            self._watch.note("a gradient", finite, self.trainer.global_step)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _clips(self, algorithm: str | None) -> bool:
        """Whether gradients are as they are, whole, and clipped by their norm."""
        whole = type(self.trainer.precision_plugin) in (Precision, MixedPrecision)
        return whole and self._scaler is None and algorithm in (None, "norm")

    def located(self, part: str) -> AbstractContextManager[None]:
        """Returns a context that adds the part of a run and the step to non-finite errors."""
        return located(part, self._step())

    def _step(self) -> int:
        return 0 if self._trainer is None else self.trainer.global_step

    def _check_loss(self, loss: Tensor) -> None:
        # One of several processes must not end alone: the others would wait for its gradients. They
        # all have what is not finite in theirs, when they have been added up.
        if self._trainer is None or self.trainer.world_size == 1:
            self._watch.note("the loss", loss.isfinite(), self._step())
        if self._trainer is not None and self._step() % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._watch.check()

    def _in_range_test(self) -> bool:
        """Whether a learning-rate finder tries rates, of which the last may be too large."""
        if self._trainer is None:
            return False
        configs = self.trainer.lr_scheduler_configs
        return bool(configs) and not isinstance(configs[0].scheduler, Schedule)

    def on_train_end(self) -> None:
        """Asks the device whether all steps were finite."""
        self._watch.check()
