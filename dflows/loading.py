"""Trained models in Python, from checkpoints."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dflows.cli.trained import TrainedModel

__all__ = ["load"]


def load(
    path: "str | os.PathLike[str]",
    *,
    allow: Sequence[str] = (),
    device: "torch.device | str" = "cpu",
    passes: int | None = None,
    length: int | None = None,
) -> "TrainedModel":
    """Loads a checkpoint of `python -m dflows.fit`, with its vocabulary, to sample and to score.

    No code that is in the file is run.

    Args:
        path: The file, or the folder of a run, for its `best.ckpt`.
        allow: Packages, other than dflows' own, whose classes the checkpoint may name.
        device: Where the model computes.
        passes: Sequential evaluations to generate, where the model leaves the choice; its own by
            default.
        length: The largest number of dimensions that it scores and draws together, likewise.

    Returns:
        The model: `.sample(4)` generates texts, `.log_prob(texts)` and `.bits_per_character(texts)`
        score them; `.module`, `.flow` and `.vocabulary` are its parts.

    Raises:
        UserError: If the file is no checkpoint of dflows, names classes of other packages, or
            leaves no such choice.

    Example:
        >>> model = load("runs/quickstart/version_0")  # doctest: +SKIP
        >>> model.sample(2, length=40)  # doctest: +SKIP
        >>> model.bits_per_character("in the beginning")  # doctest: +SKIP
    """
    # The core stays light to import: Lightning and the datamodules are only needed here.
    from dflows.cli import trained

    return trained.load(path, allow=allow, device=device, passes=passes, length=length)
