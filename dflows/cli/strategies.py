"""The strategies by which several processes train one model."""

from pytorch_lightning.strategies import (
    DDPStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)

from dflows.errors import UserError
from lightning_modules.sharding import FullySharded

__all__ = ["chosen_strategy"]

SHARDED = ("fsdp", "deepspeed", "modelparallel", "model_parallel")
"""Words in the names of strategies that share out parameters, as `fsdp` does here."""


def chosen_strategy(strategy: str | Strategy) -> str | Strategy:
    """Returns the strategy of a name, or one that trains likewise.

    Args:
        strategy: `trainer.strategy`.

    Raises:
        UserError: If no module can be trained by it, or none has the name; the message says what
            to give in its place.
    """
    if isinstance(strategy, str):
        name = strategy.lower()
        if name == "fsdp":
            return FullySharded()
        whole = name == "auto" or (name.startswith("ddp") and name in StrategyRegistry)
        if whole or name == "single_device":
            return strategy
    elif isinstance(strategy, DDPStrategy) or type(strategy) is SingleDeviceStrategy:
        return strategy
    else:
        name = type(strategy).__name__
    if any(word in name.lower() for word in SHARDED):
        instead = "give fsdp, which shares out parameters and optimizer states by PyTorch itself"
    else:
        instead = "give ddp, fsdp where a model is too large for it, or auto"
    raise UserError(f"trainer.strategy is {name}, by which dflows does not train: {instead}")
