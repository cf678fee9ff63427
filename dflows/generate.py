"""Generates text with a checkpoint.

    python -m dflows.generate --checkpoint runs/quickstart/version_0/best.ckpt --num_samples 4

A sample longer than the model's window is made of independent windows, the last of which may be
shorter.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from dflows.cli.checkpoints import add_checkpoint_arguments, load_model, read_checkpoint
from dflows.cli.configs import Parser
from dflows.cli.errors import run_command
from dflows.cli.noise import quiet
from dflows.errors import UserError
from dflows.flow import Method
from lightning_modules import BaseModule, DiscreteFlowModule

__all__ = ["draw", "generate", "main"]

AT_ONCE = 256


def draw(
    module: BaseModule,
    num_samples: int,
    length: int,
    window: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    method: Method = "levels",
) -> Tensor:
    """Draws samples of any length.

    Args:
        module: The model.
        num_samples: How many, N.
        length: Dimensions of each, L.
        window: The largest number of dimensions that the model draws together.
        temperature: Divides the base's logits.
        seed: Seed of all randomness.
        method: As in :meth:`dflows.flow.DiscreteFlow.sample`.

    Returns:
        Indices (N, L): independent windows, one after the other.
    """
    generator = torch.Generator(module.device).manual_seed(seed)

    def windows(number: int, size: int) -> Tensor:
        parts = [
            module.sample(
                min(AT_ONCE, number - begin),
                length=size,
                temperature=temperature,
                generator=generator,
                method=method,
            )
            for begin in range(0, number, AT_ONCE)
        ]
        return torch.cat(parts)

    whole, rest = divmod(length, window)
    parts = []
    if whole:
        parts.append(windows(num_samples * whole, window).reshape(num_samples, whole * window))
    if rest:
        parts.append(windows(num_samples, rest))
    return torch.cat(parts, dim=1)


def generate(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments.

    Raises:
        UserError: If something that the user asked for cannot be had.
    """
    quiet()
    parser = Parser(prog="python -m dflows.generate")
    add_checkpoint_arguments(parser)
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument(
        "--length", type=int | None, default=None, help="Characters of a sample; a window's."
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", type=Method, default="levels")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, …")
    config = parser.parse_args(list(arguments))
    for key in ("num_samples", "length"):
        if config[key] is not None and config[key] < 1:
            raise UserError(f"{key} is {config[key]}: give at least 1")
    if config.seed < 0:
        raise UserError(f"seed is {config.seed}: give at least 0")
    checkpoint = read_checkpoint(config.checkpoint)
    module = load_model(checkpoint, config.allow)
    if isinstance(module, DiscreteFlowModule) and module.conditional:
        raise UserError(
            f"the model in {checkpoint.path} is conditional, and this command has no context to "
            "give it: draw with flow(context).sample() in Python"
        )
    try:
        module.to(_device(config.device))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {config.device} cannot be had: {error}") from None
    window = checkpoint.length
    samples = draw(
        module,
        config.num_samples,
        config.length or window,
        window,
        temperature=config.temperature,
        seed=config.seed,
        method=config.method,
    )
    for row in samples.cpu():
        print(checkpoint.vocabulary.decode(row))


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: generate(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
