"""Generates text with a checkpoint.

    python -m dflows.generate --checkpoint runs/quickstart/version_0/best.ckpt --num_samples 4

A sample longer than the model's window is made of independent windows, the last of which may be
shorter. A prompt is what the first of them begins with; the rest of it is drawn from its exact
distribution given the prompt, where the model can have that:

    python -m dflows.generate --checkpoint runs/lstm/version_0/best.ckpt --prompt "the "
"""

import sys
from collections.abc import Callable, Sequence
from typing import Self

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
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
    prompt: Tensor | None = None,
    drawn: Callable[[int, int], None] | None = None,
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
        prompt: Indices (n,) that every sample begins with; at most a window.
        drawn: Told after every batch how many windows are drawn, and how many will be.

    Returns:
        Indices (N, L): independent windows, one after the other.

    Raises:
        UserError: If the prompt does not fit, or the model can have none.
    """
    generator = torch.Generator(module.device).manual_seed(seed)
    total, done = num_samples * -(-length // window), 0
    if prompt is not None:
        _check_prompt(module, len(prompt), length, window)

    def windows(number: int, size: int, **options: Tensor) -> Tensor:
        nonlocal done
        parts = []
        for begin in range(0, number, AT_ONCE):
            part = module.sample(
                min(AT_ONCE, number - begin),
                length=size,
                temperature=temperature,
                generator=generator,
                method=method,
                **options,
            )
            parts.append(part)
            done += len(part)
            if drawn is not None:
                drawn(done, total)
        return torch.cat(parts)

    parts = []
    if prompt is not None:
        first = min(window, length)
        parts.append(windows(num_samples, first, prompt=prompt))
        length -= first
    whole, rest = divmod(length, window)
    if whole:
        parts.append(windows(num_samples * whole, window).reshape(num_samples, whole * window))
    if rest:
        parts.append(windows(num_samples, rest))
    return torch.cat(parts, dim=1)


def _check_prompt(module: BaseModule, number: int, length: int, window: int) -> None:
    if not isinstance(module, DiscreteFlowModule):
        raise UserError(
            f"a prompt was given, and a {type(module).__name__} takes none: leave it away"
        )
    if number > min(window, length):
        what = f"samples have {length}" if length < window else f"the model draws {window} at once"
        raise UserError(
            f"the prompt has {number} characters, and {what}: give a shorter prompt"
            + (", or a greater length" if length < window else "")
        )


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
    parser.add_argument(
        "--prompt", type=str | None, default=None, help="What every sample begins with."
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, …")
    parser.add_argument(
        "--compile", action="store_true", help="Compile what is run level by level."
    )
    parser.add_argument(
        "--cuda_graph", action="store_true", help="Launch all levels at once on a CUDA device."
    )
    config = parser.parse_args(list(arguments))
    for key in ("num_samples", "length"):
        if config[key] is not None and config[key] < 1:
            raise UserError(f"{key} is {config[key]}: give at least 1")
    if config.seed < 0:
        raise UserError(f"seed is {config.seed}: give at least 0")
    if config.prompt == "":
        raise UserError("prompt is empty: give at least one character, or leave it away")
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
    _accelerate(module, config.compile, config.cuda_graph)
    prompt = None
    if config.prompt is not None:
        classes = checkpoint.vocabulary.encode(config.prompt, "the prompt").astype("int64")
        prompt = torch.from_numpy(classes).to(module.device)
    window = checkpoint.length
    with _Watch(module) as watch:
        samples = draw(
            module,
            config.num_samples,
            config.length or window,
            window,
            temperature=config.temperature,
            seed=config.seed,
            method=config.method,
            prompt=prompt,
            drawn=watch.drawn,
        )
    if config.method == "fixed_point" and watch.evaluations:
        print(watch.describe(), file=sys.stderr)
    for row in samples.cpu():
        print(checkpoint.vocabulary.decode(row))


def _accelerate(module: BaseModule, compiled: bool, cuda_graph: bool) -> None:
    if not compiled and not cuda_graph:
        return
    if not isinstance(module, DiscreteFlowModule):
        key = "compile" if compiled else "cuda_graph"
        raise UserError(
            f"{key} is set, and a {type(module).__name__} is computed in one way: leave it away"
        )
    module.flow.accelerate(compile=compiled, cuda_graph=cuda_graph)


class _Watch:
    """Creates a progress bar for many windows, and notes the evaluations that batches took.

    Arguments:
        module: What draws.
    """

    def __init__(self, module: BaseModule) -> None:
        self.module = module
        self.evaluations: list[int] = []
        shown = sys.stderr.isatty()
        self._bar = Progress(console=Console(stderr=True), transient=True, disable=not shown)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def drawn(self, done: int, total: int) -> None:
        """Notes a batch."""
        if isinstance(self.module, DiscreteFlowModule):
            self.evaluations.append(sum(self.module.flow.evaluations))
        if self._task is None and done < total:
            self._bar.start()
            self._task = self._bar.add_task("windows", total=total)
        if self._task is not None:
            self._bar.update(self._task, completed=done)

    def describe(self) -> str:
        """Returns how many iterations the fixed point took."""
        mean = sum(self.evaluations) / len(self.evaluations)
        passes = self.module.passes
        return f"the fixed point took {mean:.4g} iterations a batch; level by level it is {passes}"


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: generate(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
