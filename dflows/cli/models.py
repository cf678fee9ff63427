"""Models of checkpoints as commands ask for them: where, how large, and exact."""

from typing import Any

import torch
from jsonargparse import ArgumentParser

from dflows.cli.checkpoints import Checkpoint, load_model
from dflows.codec import TextCodec
from dflows.codec.archive import ArchiveReader
from dflows.codec.flows import check_weights
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from lightning_modules import BaseModule

__all__ = [
    "add_size_arguments",
    "check_counts",
    "exact_flow",
    "find_device",
    "resized_flow",
    "text_codec",
]


def add_size_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments of the sizes that a model may leave to choose."""
    parser.add_argument(
        "--passes", type=int | None, default=None, help="Passes to generate; the model's own."
    )
    parser.add_argument(
        "--window", type=int | None, default=None, help="Characters drawn together; the model's."
    )


def find_device(name: str) -> torch.device:
    """Returns a device by its name; `auto` is the accelerator, where there is one.

    Raises:
        UserError: If it is not there.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} is not available: {error}") from None
    return device


def exact_flow(module: BaseModule) -> DiscreteFlow:
    """Returns the flow of a module, whose likelihood is exact.

    Raises:
        UserError: If there is none.
    """
    name = type(module).__name__
    if module.likelihood != "exact":
        raise UserError(
            f"the likelihood of a {name} is a {module.likelihood}, and nothing can be encoded in "
            "so many bits: give a checkpoint of an exact model"
        )
    flow = getattr(module, "flow", None)
    if not isinstance(flow, DiscreteFlow):
        raise UserError(f"a {name} has no flow, whose levels could be decoded: train a FlowModule")
    return flow


def text_codec(
    checkpoint: Checkpoint,
    *,
    allow: list[str],
    device: str,
    passes: int | None = None,
    window: int | None = None,
    archive: ArchiveReader | None = None,
) -> TextCodec:
    """Makes the model of a checkpoint, and what encodes and decodes with it.

    Args:
        checkpoint: The checkpoint.
        allow: Packages whose classes it may name.
        device: Where the model computes.
        passes: Passes of the model; its own, where not given.
        window: Symbols of a window, likewise.
        archive: What it is to decode, which says both.

    Raises:
        UserError: If the model cannot encode a text.
        ArchiveError: If it has not written the archive.
    """
    module = load_model(checkpoint, allow).to(find_device(device))
    if archive is not None:
        check_weights(exact_flow(module), archive)
        passes, window = archive.header.passes, archive.header.length
    flow = resized_flow(module, checkpoint, passes, window)
    return TextCodec(flow, checkpoint.vocabulary.text_symbols())


def check_counts(config: Any, *keys: str) -> None:
    """Refuses numbers below 1 among the arguments of a command.

    Raises:
        UserError: If there is one; the message names its key.
    """
    for key in keys:
        if config[key] is not None and config[key] < 1:
            raise UserError(f"{key} is {config[key]}: give at least 1")


def resized_flow(
    module: BaseModule, checkpoint: Checkpoint, passes: int | None, window: int | None
) -> DiscreteFlow:
    """Returns the exact flow of a module, in the window and the passes that are asked for.

    Raises:
        UserError: If there is none, or the model cannot have them.
    """
    exact_flow(module)
    if window not in (None, checkpoint.length):
        module.resize(length=window)
    if passes not in (None, module.passes):
        module.resize(passes=passes)
    return exact_flow(module)
