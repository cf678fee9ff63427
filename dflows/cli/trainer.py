"""The trainer of the commands."""

from datetime import timedelta
from typing import Any, Literal, TypeAlias, get_args

import pytorch_lightning as pl
from jsonargparse.typing import PositiveFloat
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.trainer.connectors.checkpoint_connector import _CheckpointConnector

from dflows.cli.launchers import check_devices, check_launcher, launched
from dflows.cli.logs import Environment
from dflows.cli.loops import FitLoop
from dflows.cli.slurm import environment
from dflows.cli.strategies import chosen_strategy
from dflows.cli.together import join
from dflows.errors import UserError
from dflows.precision import trainer_precision

__all__ = ["PRECISIONS", "Trainer"]

# Spelled out: of a wrong name the commands say what is expected by the first type of a union.
Name: TypeAlias = Literal[
    "auto",
    "32-true",
    "bf16-mixed",
    "16-mixed",
    "64-true",
    "bf16-true",
    "16-true",
    "transformer-engine",
    "transformer-engine-float16",
    "64",
    "32",
    "16",
    "bf16",
]

PRECISIONS = (*get_args(Name), 64, 32, 16, None)
"""The precisions that a configuration may name."""


class _Checkpoints(_CheckpointConnector):
    """Creates what reads the checkpoints that it is given, and no others.

    In a job of SLURM Lightning's takes any `hpc_ckpt_N.ckpt` in the working folder, whosever it is,
    before all that is trained, validated or tested.
    """

    _hpc_resume_path = None


LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "limit_train_batches": 0,
    "log_every_n_steps": 1,
    "min_steps": 0,
    "num_sanity_val_steps": -1,
    "val_check_interval": 0,
}
"""What numbers must be at least, where Lightning does not look."""


class Trainer(pl.Trainer):
    """Creates Lightning's trainer, which may choose its precision, and joins what torchrun started.

    Args:
        accelerator: As Lightning takes it.
        devices: As Lightning takes them; under torchrun, `auto` is one for every process of a node.
        num_nodes: Nodes; under torchrun, 1 is all that there are.
        strategy: As Lightning takes it; `fsdp` is
            :class:`lightning_modules.sharding.FullySharded`.
        precision: As Lightning takes it; or `auto`, which is bf16-mixed on a GPU or a processor
            with fast bfloat16, else 32-true (:func:`dflows.precision.trainer_precision`).
        collective_timeout: Seconds that a process waits for the others in any one place, such as
            the sum of gradients, before it takes them to be gone.
        kwargs: Lightning's other arguments.

    Raises:
        UserError: If a number is one that Lightning would divide by 0 with, or misread; if there
            are not so many devices; if no module trains by the strategy, or the processes that it
            starts would hand nothing back.
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        strategy: str | Strategy = "auto",
        precision: Name | Literal[64, 32, 16] | None = None,
        collective_timeout: PositiveFloat = 1800.0,
        **kwargs: Any,
    ) -> None:
        for key, least in LEAST.items():
            value = kwargs.get(key)
            if isinstance(value, (int, float)) and not value >= least:
                raise UserError(f"trainer.{key} is {value}: give at least {least}")
        if kwargs.get("val_check_interval") == 0:
            raise UserError(
                "trainer.val_check_interval is 0: give the batches from one validation to the "
                "next, or set limit_val_batches to 0 for none"
            )
        if precision == "auto":
            precision = trainer_precision(accelerator)
        plugins = kwargs.pop("plugins", None) or []
        plugins = [*plugins] if isinstance(plugins, list) else [plugins]
        job = environment()
        if job is not None and not any(isinstance(entry, ClusterEnvironment) for entry in plugins):
            plugins.append(job)
        devices, num_nodes = launched(devices, num_nodes)
        check_devices(devices, accelerator)
        super().__init__(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=chosen_strategy(strategy),
            precision=precision,
            plugins=plugins,
            **kwargs,
        )
        check_launcher(self)
        every = kwargs.get("val_check_interval")
        if self.world_size > 1 and isinstance(every, (str, dict, timedelta)):
            raise UserError(
                f"trainer.val_check_interval is the time {every}, and the clocks of several "
                "processes differ: give the batches from one validation to the next"
            )
        self.callbacks.insert(0, Environment())  # type: ignore[attr-defined]
        join(self, collective_timeout)
        self._checkpoint_connector = _Checkpoints(self)
        given = self.fit_loop
        self.fit_loop = FitLoop(self, min_epochs=given.min_epochs, max_epochs=given.max_epochs)
        self.fit_loop.epoch_loop = given.epoch_loop
