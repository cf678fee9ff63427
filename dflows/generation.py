"""From noise to samples: through the base and the transforms, with or without a prompt."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from dflows.acceleration import Acceleration
from dflows.arguments import check_temperature
from dflows.bases import Base
from dflows.errors import UserError
from dflows.transforms import DiscreteTransform
from dflows.transforms.composition import invert_prefix

__all__ = ["Method", "check_draft", "check_sampling", "expand_prompt", "generate"]

Method = Literal["levels", "fixed_point"]


def check_sampling(temperature: float, method: str, acceleration: Acceleration) -> None:
    """Refuses sampling options that cannot be honoured.

    Raises:
        UserError: If an option cannot be honoured.
    """
    check_temperature(temperature)
    if method not in get_args(Method):
        raise UserError(f"method is {method!r}: give 'levels' or 'fixed_point'")
    if method == "fixed_point" and acceleration.cuda_graph:
        raise UserError(
            "method is 'fixed_point', whose number of iterations depends on the values, and a CUDA "
            "graph is fixed: use method 'levels', or unset cuda_graph"
        )


def check_draft(draft: Base | None, base: Base, method: str) -> None:
    """Refuses what cannot guess the samples of a base.

    Raises:
        UserError: If it cannot, or nobody asks it.
    """
    if draft is None:
        return
    if method != "fixed_point":
        raise UserError(
            f"a draft was given and method is {method!r}, which guesses nothing: give method "
            "'fixed_point', or no draft"
        )
    if not base.passes:
        raise UserError(
            f"a draft was given, and {type(base).__name__} is sampled without a network: leave "
            "the draft away"
        )
    if not isinstance(draft, Base) or draft.drafter(torch.empty(1, 1)) is None:
        raise UserError(
            f"the draft, {type(draft).__name__}, guesses nothing without a network: give an "
            "NGramBase"
        )
    for name, drafted, own in (
        ("num_classes", str(draft.classes), str(base.classes)),
        ("length", draft.length, base.length),
    ):
        if drafted != own:
            raise UserError(
                f"the draft has {name} {drafted}, and the flow {own}: give one that was counted on "
                "the flow's data"
            )


def expand_prompt(
    prompt: Tensor, shape: torch.Size, length: int, parts: Sequence[Base | DiscreteTransform]
) -> Tensor:
    """Repeats a prompt for every sample.

    Args:
        prompt: Indices (n,), or one a sample ``(*shape, n)``.
        shape: Shape of the samples.
        length: Dimensions of a sample.
        parts: The base and the transforms.

    Returns:
        Indices (N, n).

    Raises:
        UserError: If the prompt does not fit the samples, or a part cannot condition on it exactly.
    """
    number = prompt.shape[-1] if prompt.ndim else 0
    if not 1 <= number <= length:
        raise UserError(
            f"a prompt {tuple(prompt.shape)} was given, and samples have {length} dimensions: "
            "give it 1 to that many"
        )
    if prompt.shape[:-1] not in (torch.Size(), shape):
        raise UserError(
            f"a prompt {tuple(prompt.shape)} was given for samples {(*shape, length)}: give "
            f"one for all, ({number},), or one a sample, {(*shape, number)}"
        )
    for part in parts:
        if not part.supports_prefix(number, length):
            over = "" if part.ordering is None else f" over {part.ordering!r}"
            raise UserError(
                f"a prompt of {number} dimensions cannot be conditioned on exactly: in "
                f"{type(part).__name__}{over} they depend on later dimensions; give no prompt, or "
                "train a model over the natural ordering"
            )
    return prompt.expand(*shape, number).reshape(-1, number)


def generate(
    base: Base,
    transforms: Sequence[DiscreteTransform],
    noise: Tensor,
    context: Tensor | None,
    prompt: Tensor | None,
    *,
    temperature: float = 1.0,
    fixed_point: bool = False,
    draft: Base | None = None,
) -> tuple[Tensor, list[int]]:
    """Turns noise into samples.

    Args:
        base: The distribution of x.
        transforms: Transforms base → data.
        noise: Noise of the base (N, d).
        context: Vectors (N, C) or sequences (N, S, C).
        prompt: Prefix of the samples, indices (N, n).
        temperature: Divides the base's logits.
        fixed_point: Whether to iterate over all dimensions instead of level by level.
        draft: Guesses the base's samples, for the iterations.

    Returns:
        Indices (N, d), and the number of evaluations of the base and of every transform.
    """
    known: list[Tensor | None] = [None] * (1 + len(transforms))
    if prompt is not None:
        known[:] = invert_prefix(transforms, prompt, noise.shape[1], context)
    value, count = base.from_noise(
        noise,
        context,
        temperature=temperature,
        fixed_point=fixed_point,
        prefix=known[0],
        draft=draft,
    )
    evaluations = [count]
    for transform, prefix in zip(transforms, known[1:], strict=True):
        value, count = transform.generate(value, context, prefix=prefix, fixed_point=fixed_point)
        evaluations.append(count)
    return value, evaluations
