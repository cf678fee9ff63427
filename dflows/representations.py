"""The two representations of a discrete value, indices and one-hot vectors, and logits of one.

Indices are integer tensors (…, D) with values 0..K-1; one-hot vectors are floating tensors
(…, D, K) that carry the same value where a gradient must pass. Every transform and base accepts
either and returns the kind that it was given.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dflows.classes import Classes
from dflows.errors import NonFiniteError, UserError
from dflows.precision import has_bfloat16

__all__ = [
    "batch_shape",
    "check_indices",
    "check_largest",
    "check_logits",
    "exactly",
    "flatten_batch",
    "full_precision",
    "is_at_hand",
    "is_one_hot",
    "lstm_autocast",
    "repeat_context",
    "to_indices",
    "to_one_hot",
    "without_autocast",
    "without_tf32",
]


def is_one_hot(value: Tensor) -> bool:
    """Says whether a value is held as one-hot vectors (floating) rather than as indices."""
    return value.is_floating_point()


def check_indices(y: Tensor, classes: Classes, *, wait: bool = False) -> Tensor:
    """Returns indices as 64-bit integers.

    Args:
        y: Indices (…, d).
        classes: The classes of D dimensions.
        wait: Whether to look at the values even where that waits for a device.

    Raises:
        UserError: If they are no indices of the classes, or have more than D dimensions.
    """
    if y.is_floating_point() or y.dtype == torch.bool:
        most = classes.largest - 1
        raise UserError(f"values of dtype {y.dtype} were given: give indices 0..{most} as integers")
    if y.ndim < 1 or not 1 <= y.shape[-1] <= classes.length:
        raise UserError(
            f"an event of {y.shape[-1] if y.ndim else 0} dimensions was given, and the flow has "
            f"{classes.length}: give 1 to that many"
        )
    if wait or (y.device.type == "cpu" and not torch.compiler.is_compiling()):
        inside = classes.contains(y)
        if not inside.all():
            place = (~inside).nonzero()[0].tolist()
            where = "" if classes.each is None else f" at dimension {place[-1]}"
            most = classes.largest - 1 if classes.each is None else classes.each[place[-1]] - 1
            raise UserError(f"a value of {int(y[tuple(place)])}{where} lies outside 0..{most}")
    return y.long()


def to_indices(value: Tensor) -> Tensor:
    """Returns the indices (…, D) of a value held in either representation."""
    return value.argmax(dim=-1) if is_one_hot(value) else value


def to_one_hot(value: Tensor, num_classes: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the one-hot vectors (…, D, K) of a value held in either representation.

    Args:
        value: Indices (…, D), or one-hot vectors, which are returned as they are.
        num_classes: K.
        dtype: Floating type of the vectors; torch's default where it is not given.

    Example:
        >>> to_one_hot(torch.tensor([2, 0]), num_classes=3)
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    if is_one_hot(value):
        return value
    return F.one_hot(value, num_classes).to(dtype or torch.get_default_dtype())


def batch_shape(value: Tensor) -> torch.Size:
    """Returns the batch shape of a value (…, D) or (…, D, K)."""
    return value.shape[:-2] if is_one_hot(value) else value.shape[:-1]


def repeat_context(context: Tensor, repeats: int) -> Tensor:
    """Repeats a batch of contexts (B, …), as a whole and so many times, to (repeats·B, …)."""
    return context.expand(repeats, *context.shape).reshape(-1, *context.shape[1:])


def flatten_batch(
    value: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor | None, torch.Size]:
    """Flattens the batch dimensions of a value, and repeats a context to match.

    Args:
        value: Indices (…, D) or one-hot vectors (…, D, K).
        context: Vectors (B, C) or sequences (B, S, C), where the last batch dimension of `value`
            is B; or nothing.

    Returns:
        The value (N, D) or (N, D, K), the context (N, C) or (N, S, C), and the batch shape.

    Raises:
        UserError: If the batches of value and context differ.
    """
    shape = batch_shape(value)
    flat = value.reshape(-1, *value.shape[len(shape) :])
    if context is None:
        return flat, None, shape
    if context.ndim not in (2, 3):
        raise UserError(
            f"the context has shape {tuple(context.shape)}: give vectors (B, C) or sequences "
            "(B, S, C)"
        )
    if not shape or shape[-1] != context.shape[0]:
        raise UserError(
            f"a batch of {tuple(shape)} meets a context of {tuple(context.shape)}: the last batch "
            "dimension of the values must be the first of the context"
        )
    repeats = flat.shape[0] // max(context.shape[0], 1)
    return flat, repeat_context(context, repeats), shape


def full_precision(values: Tensor) -> Tensor:
    """Returns floating values in float32, or in float64 where they are held so.

    Example:
        >>> full_precision(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    if values.dtype in (torch.float32, torch.float64):
        return values
    return values.to(torch.promote_types(values.dtype, torch.float32))


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Returns a context without autocast, which costs nothing where there is none."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def lstm_autocast() -> AbstractContextManager[object]:
    """Returns the context that an LSTM is called in: autocast as it is, where there is one for it.

    On a CPU without fast bfloat16 PyTorch's LSTM fails under autocast or is slower than in float32,
    and one in float16 cannot be trained: there, autocast is off.
    """
    if torch.get_autocast_dtype("cpu") == torch.bfloat16 and has_bfloat16("cpu"):
        return nullcontext()
    return without_autocast("cpu")


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Evaluates without gradients in full precision, whatever autocast and TF32 say.

    In fewer bits the features from one evaluation of all levels differ from those from one
    evaluation a level: transforms would choose different maps in the two directions, and what is
    scored would not be what is sampled. With gradients precision is as the caller has it.
    """
    if torch.is_grad_enabled():
        yield
    else:
        with without_autocast(device.type), without_tf32():
            yield


@contextmanager
def without_tf32() -> Iterator[None]:
    """Multiplies float32 in float32: cuDNN takes TF32 by default, and others where it is set."""
    if torch.compiler.is_compiling():
        yield
        return
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    kinds: list[Any] = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    try:  # what older functions set and ask for, which must agree
        older = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # someone has set both
        older = None
    try:
        _multiply("highest", False, kinds, ["ieee"] * len(kinds))
        yield
    finally:
        matrices, allowed = older or ("highest", False)
        _multiply(matrices, allowed, kinds, before)


def _multiply(matrices: str, allowed: bool, kinds: list[Any], precisions: list[str]) -> None:
    torch.set_float32_matmul_precision(matrices)
    torch.backends.cudnn.allow_tf32 = allowed
    for kind, precision in zip(kinds, precisions, strict=True):
        kind.fp32_precision = precision


def is_at_hand(values: Tensor) -> bool:
    """Says whether values can be looked at: not while they are traced or captured in a graph."""
    if torch.compiler.is_compiling() or values.is_meta:
        return False
    return not (values.is_cuda and torch.cuda.is_current_stream_capturing())


def check_logits(logits: Tensor, name: str) -> Tensor:
    """Returns logits (…, M) in full precision, and refuses those that choose nothing.

    A class may have the logit -inf, and so probability 0. A row must have a finite maximum.
    While torch.compile traces or a CUDA graph is captured, values cannot be looked at, and nothing
    is refused.

    Args:
        logits: Logits (…, M) of any floating type.
        name: Who asks, for the message.

    Raises:
        NonFiniteError: If a row holds NaN or +inf, or nothing but -inf.

    Example:
        >>> check_logits(torch.tensor([0.0, -torch.inf]), "ModularShift")
        tensor([0., -inf])
        >>> check_logits(torch.tensor([0.0, torch.nan]), "ModularShift")
        Traceback (most recent call last):
        dflows.errors.NonFiniteError: ModularShift was given logits with NaN in 1 of 1 rows...
    """
    logits = full_precision(logits)
    # The sum is one quick look at all of them: where it is finite, they are.
    if is_at_hand(logits) and not math.isfinite(logits.detach().sum()):
        check_largest(logits.detach().amax(dim=-1), name)
    return logits


def check_largest(largest: Tensor, name: str) -> None:
    """Refuses logits by the largest (…) of every row, as :func:`check_logits` does.

    Raises:
        NonFiniteError: If one of them is not finite.
    """
    # The sum is one quick look at all of them; it may overflow, so that it does not decide.
    if not is_at_hand(largest) or math.isfinite(largest.sum()):
        return
    bad = largest[~largest.isfinite()]
    if not bad.numel():
        return
    what = "NaN" if bad.isnan().any() else "+inf" if (bad > 0).any() else "nothing but -inf"
    raise NonFiniteError(
        f"{name} was given logits with {what} in {bad.numel()} of {largest.numel()} rows, and "
        "would not be a bijection. The network has most likely diverged: lower the learning rate, "
        "clip gradients, or use a precision of more range than float16"
    )
