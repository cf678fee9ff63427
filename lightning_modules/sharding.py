"""Parameters and optimizer states that processes share out, so that each holds a part."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.overrides.distributed import _sync_module_states
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from dflows.conditioner import Conditioner
from dflows.errors import UserError

__all__ = ["FullySharded", "full", "part_like", "whole"]

STEPS = ("training_step", "log_prob", "sample")
"""Methods of a module that gather its parameters while they run."""

ALONE = {"LearningRateFinder", "BatchSizeFinder", "StochasticWeightAveraging", "WeightAveraging"}
"""Callbacks that train, change or keep weights, and know of no parts; some Lightnings lack some."""

_OF_PARTS = re.compile("DTensor|sharding strategy")
"""What PyTorch says where a part is taken for the whole."""


def full(tensor: Tensor) -> Tensor:
    """Returns a tensor of which each process may hold a part; all must ask at once.

    Example:
        >>> full(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Returns of a tensor the part that this process holds of a parameter of the same shape.

    Args:
        tensor: The whole tensor, the same in all processes.
        parameter: The parameter; where it is whole, so is what is returned.
    """
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    # No process sends: each takes its part.
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


class _Cover:
    """Creates what takes off a module all that sharding has put on it, and puts it on again.

    Sharded modules have another class, hooks, and attributes. A module without them can be copied,
    and called in any way, by any number of processes.

    Args:
        module: The module, before it is sharded.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._plain = self._sharded = type(module)
        self._names = set(vars(module))
        self._known = {name: set(hooks) for name, hooks in self._hooks()}
        self._added: dict[str, Any] = {}
        self._hooked: list[tuple[str, Any, Any]] = []

    def _hooks(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in vars(self._module).items() if "_hooks" in name]

    def settle(self) -> None:
        """Sees what has been put on."""
        self._sharded = type(self._module)
        own = vars(self._module)
        self._added = {name: own[name] for name in own if name not in self._names}
        self._hooked = [
            (name, key, hook)
            for name, hooks in self._hooks()
            for key, hook in hooks.items()
            if key not in self._known[name]
        ]

    def take_off(self) -> None:
        """Takes it off."""
        self._module.__class__ = self._plain
        for name in self._added:
            del vars(self._module)[name]
        for name, key, _ in self._hooked:
            del vars(self._module)[name][key]

    def put_on(self) -> None:
        """Puts it on again."""
        self._module.__class__ = self._sharded
        vars(self._module).update(self._added)
        for name, key, hook in self._hooked:
            hooks = vars(self._module)[name]
            hooks[key] = hook
            if "pre" in name:
                hooks.move_to_end(key, last=False)


class FullySharded(DDPStrategy):
    """Creates the strategy `fsdp`: FSDP2, by which n processes hold a part of 1/n each.

    While it trains, a process holds its part of the parameters, their gradients and the
    optimizer's states. A training step gathers the parameters, and with `blocks` those of one block
    at a time. All else finds the module whole, as in one process: certificates, validations and
    tests, counts, and what comes after the training. Checkpoints are those of one process, too,
    gathered by the first, and start any number of processes, with any strategy.

    Args:
        blocks: Whether the layers of a backbone, as entries of an `nn.ModuleList`, are gathered one
            by one. It saves memory of large networks; but a step must call them, all layers in
            all processes as often: one network, that is, and no objective that leaves parts out.

    Example:
        >>> trainer = pl.Trainer(strategy=FullySharded(), devices=2)  # doctest: +SKIP
    """

    def __init__(self, blocks: bool = False) -> None:
        super().__init__()
        self.blocks = blocks
        self._covers: list[_Cover] = []
        self._parts: dict[str, nn.Parameter] = {}
        self.is_whole = True

    @property
    def _own(self) -> pl.LightningModule:
        return cast("pl.LightningModule", self.lightning_module)

    def setup(self, trainer: pl.Trainer) -> None:
        """Shards the module of a fit, which is whole again until the first step."""
        super().setup(trainer)
        self.gather()

    def configure_ddp(self) -> None:
        """Shards the module, before it has an optimizer.

        Raises:
            UserError: If a parameter has no dimension that could be shared out, or a callback
                trains, changes or keeps weights by itself.
        """
        module = self._own
        for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
            if ALONE & {base.__name__ for base in type(callback).__mro__}:
                raise UserError(
                    f"trainer.strategy is fsdp, and a {type(callback).__name__} needs whole "
                    "weights between steps: leave it away, or give ddp"
                )
        scalars = [name for name, parameter in module.named_parameters() if not parameter.ndim]
        if scalars:
            raise UserError(
                f"trainer.strategy is fsdp, and {scalars[0]} is a single number, which cannot be "
                "shared out: make it a vector of one, or give ddp"
            )
        _sync_module_states(module)
        self._covers = [_Cover(part) for part in module.modules()]
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        blocks = _blocks(module) if self.blocks else []
        if self.blocks and not blocks:
            raise UserError(
                "blocks of trainer.strategy is set, and no backbone of the model has layers in an "
                "nn.ModuleList: unset it"
            )
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        for name in STEPS:
            register_fsdp_forward_method(module, name)
        for part in _sharded(module):
            part.unshard()  # the first time it adds hooks
            part.reshard()
        for cover in self._covers:
            cover.settle()
        self.is_whole = False

    def gather(self) -> None:
        """Makes the module whole, in all processes at once."""
        if self.is_whole:
            return
        module = self._own
        self._parts = dict(module.named_parameters())
        with torch.inference_mode(mode=False), torch.no_grad():
            for part in _sharded(module):
                part.unshard()
        for cover in self._covers:
            cover.take_off()
        self.is_whole = True

    def scatter(self) -> None:
        """Leaves the process its part of the module again, changes to the whole included."""
        if self.is_whole and self._covers:
            module = self._own
            with torch.inference_mode(mode=False), torch.no_grad():
                for name, parameter in module.named_parameters():
                    self._parts[name].copy_(part_like(parameter, self._parts[name]))
                for cover in self._covers:
                    cover.put_on()
                for part in _sharded(module):
                    part.reshard()
            self.is_whole = False

    def evaluates(self) -> None:
        """Gathers the module for an evaluation, with the buffers of the first process."""
        self.gather()
        for buffer in self._own.buffers():
            distributed.broadcast(buffer, 0)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Trains on a batch.

        Raises:
            UserError: If it takes parameters of a layer that it does not call.
        """
        try:
            return super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if self.blocks and _OF_PARTS.search(str(error)):
                raise UserError(
                    "blocks of trainer.strategy is set, and the training step takes parameters of "
                    "a layer of a backbone that it does not call: unset blocks"
                ) from error
            raise

    def on_train_start(self) -> None:
        """Leaves the process its part: the steps begin."""
        self.scatter()

    def on_validation_end(self) -> None:
        """Leaves the process its part: the steps go on."""
        if not self._own.trainer.sanity_checking:
            self.scatter()

    def on_train_end(self) -> None:
        """Makes the module what it was before the fit."""
        self.gather()
        self._covers, self._parts = [], {}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the state of the whole module, in the first process."""
        self.scatter()
        if self.is_whole:
            return super().lightning_module_state_dict()
        return self._collected(self._own.state_dict(keep_vars=True))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the states of an optimizer of the whole module, in the first process."""
        return self._collected(super().optimizer_state(optimizer))

    @torch.no_grad()
    def _collected(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns a state with whole tensors, in the first process."""
        found: dict[int, Tensor | None] = {}  # what has two names is gathered and saved once

        def collect(value: DTensor) -> Tensor | None:
            if id(value) not in found:
                gathered = value.full_tensor()
                found[id(value)] = gathered.cpu() if self.is_global_zero else None
            return found[id(value)]

        return cast("dict[str, Any]", apply_to_collection(state, DTensor, collect))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes of the states of whole parameters the parts of this process."""
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [entry for group in optimizer.param_groups for entry in group["params"]]
            names = [entry for group in state["param_groups"] for entry in group["params"]]
            parts = dict(state["state"])
            for parameter, name in zip(parameters, names, strict=False):
                parts[name] = {
                    key: part_like(value, parameter) if value.shape == parameter.shape else value
                    for key, value in parts.get(name, {}).items()
                }
            states.append({**state, "state": {key: own for key, own in parts.items() if own}})
        super().load_optimizer_state_dict({"optimizer_states": states})

    def teardown(self) -> None:
        """Ends; the module stays on its device, where a part of it may be all there is."""
        assert self.cluster_environment is not None  # noqa: S101
        assert self.accelerator is not None  # noqa: S101
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def _sharded(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Returns the layers of backbones whose parameters are of no other part."""
    owners: dict[nn.Parameter, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    backbones = [part.backbone for part in module.modules() if isinstance(part, Conditioner)]
    found = {
        layer: None
        for backbone in backbones
        for part in backbone.modules()
        if isinstance(part, nn.ModuleList)
        for layer in part
        if all(owners[parameter] == 1 for parameter in layer.parameters())
    }
    inner = {part for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if layer not in inner]


@contextmanager
def whole(module: pl.LightningModule) -> Iterator[None]:
    """Makes a module whole for a while, where processes hold a part each; all must do so at once.

    Args:
        module: The module, whose parameters may be changed: to the same values in all processes.
    """
    strategy = None if module._trainer is None else module.trainer.strategy
    if not isinstance(strategy, FullySharded) or strategy.is_whole:
        yield
        return
    strategy.gather()
    try:
        yield
    finally:
        strategy.scatter()
