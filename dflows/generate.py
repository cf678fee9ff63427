"""Generates text with a checkpoint.

    python -m dflows.generate --checkpoint runs/quickstart/version_0/best.ckpt --num_samples 4

A sample longer than the model's window is made of independent windows, the last of which may be
shorter. A prompt is what the first of them begins with; the rest of it is drawn from its exact
distribution given the prompt, where the model can have that:

    python -m dflows.generate --checkpoint runs/lstm/version_0/best.ckpt --prompt "the "

A model over lanes leaves the number of passes and the window to choose:

    python -m dflows.generate --checkpoint runs/lanes/version_0/best.ckpt --passes 32 --window 4096

With ``--method fixed_point``, an n-gram model of the same data may guess what the network settles,
in fewer iterations: ``--draft runs/ngram/version_0``.
"""

import sys
from collections.abc import Sequence
from typing import Self

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from dflows.cli.checkpoints import add_checkpoint_arguments, load_model, read_checkpoint
from dflows.cli.configs import Parser, check_seed
from dflows.cli.errors import run_command
from dflows.cli.models import add_size_arguments, check_counts, find_device
from dflows.cli.noise import quiet
from dflows.cli.rows import check_length
from dflows.cli.trained import TrainedModel, draw, load
from dflows.errors import UserError
from lightning_modules import BaseModule
from lightning_modules.base import Method

__all__ = ["generate", "main"]


def generate(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments.

    Raises:
        UserError: If the arguments cannot be honoured.
    """
    quiet()
    parser = Parser(prog="python -m dflows.generate")
    add_checkpoint_arguments(parser)
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument(
        "--length", type=int | None, default=None, help="Characters of a sample; a window's."
    )
    add_size_arguments(parser)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", type=Method, default="levels")
    parser.add_argument(
        "--prompt", type=str | None, default=None, help="What every sample begins with."
    )
    parser.add_argument(
        "--draft",
        type=str | None,
        default=None,
        help="A checkpoint of n-grams that guess for the fixed point.",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, …")
    parser.add_argument(
        "--compile", action="store_true", help="Compile what is run level by level."
    )
    parser.add_argument(
        "--cuda_graph", action="store_true", help="Launch all levels at once on a CUDA device."
    )
    config = parser.parse_args(list(arguments))
    check_seed("seed", config.seed)
    check_counts(config, "num_samples", "length", "passes", "window")
    if config.prompt == "":
        raise UserError("prompt is empty: give at least one character, or leave it away")
    checkpoint = read_checkpoint(config.checkpoint)
    if not checkpoint.vocabulary.is_text:
        check_length(checkpoint, config.length, config.window)
    module = load_model(checkpoint, config.allow)
    if module.conditional:
        raise UserError(
            f"the model in {checkpoint.path} is conditional, and this command has no context to "
            "give it: use dflows.load(path).sample(context=context) in Python"
        )
    module.to(find_device(config.device))
    module.resize(passes=config.passes, length=config.window)
    module.accelerate(compile=config.compile, cuda_graph=config.cuda_graph)
    prompt = None
    if config.prompt is not None:
        classes = checkpoint.vocabulary.encode(config.prompt, "the prompt").astype("int64")
        prompt = torch.from_numpy(classes).to(module.device)
    window = config.window or checkpoint.length
    draft = None
    if config.draft is not None:
        model = TrainedModel(module, checkpoint.vocabulary, window)
        draft = load(config.draft, allow=config.allow).draft_of(model)
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
            draft=draft,
            drawn=watch.drawn,
        )
    if config.method == "fixed_point" and watch.evaluations:
        print(watch.describe(), file=sys.stderr)
    for row in samples.cpu():
        print(checkpoint.vocabulary.decode(row))


class _Watch:
    """Creates a progress bar for many windows, and notes the evaluations that batches took.

    Args:
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
        if self.module.evaluations is not None:
            self.evaluations.append(self.module.evaluations)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: generate(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
