"""The trainer of the commands."""

from typing import Any, Literal, TypeAlias

import pytorch_lightning as pl
from jsonargparse.typing import PositiveFloat
from pytorch_lightning.accelerators import Accelerator

from dflows.cli.together import join
from dflows.precision import trainer_precision

__all__ = ["Trainer"]

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


class Trainer(pl.Trainer):
    """Creates Lightning's trainer, which may choose its precision.

    Args:
        accelerator: As Lightning takes it.
        precision: As Lightning takes it; or `auto`, which is bf16-mixed on a GPU or a processor
            with fast bfloat16, else 32-true (:func:`dflows.precision.trainer_precision`).
        collective_timeout: Seconds that a process waits for the others in any one place, such as
            the sum of gradients, before it takes them to be gone.
        kwargs: Lightning's other arguments.
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        precision: Name | Literal[64, 32, 16] | None = None,
        collective_timeout: PositiveFloat = 1800.0,
        **kwargs: Any,
    ) -> None:
        if precision == "auto":
            precision = trainer_precision(accelerator)
        super().__init__(accelerator=accelerator, precision=precision, **kwargs)
        join(self, collective_timeout)
