r"""Arithmetic on integers modulo K: units, inverses, the affine map and its gradient.

The location-scale map of a discrete flow is

.. math:: y = (\mu + \sigma x) \bmod K, \qquad x = \sigma^{-1} (y - \mu) \bmod K,

with :math:`\sigma` a unit, that is, coprime with K. On one-hot vectors it is multilinear in
x, :math:`\mu` and :math:`\sigma`. Since the values are exactly one-hot, every product with a
circulant matrix collapses to reading one entry, and the gradient to three gathers of K entries.

A *modulus* larger than the number of classes makes every scale but 0 a unit when it is prime. The
map then acts on K of the modulus' residues by walking its cycle: it is applied until the value
falls below K again. The walk of a permutation is a permutation, so the K classes are mapped onto
themselves, exactly; the extra residues are never a value.

References:
    | Discrete Flows: Invertible Generative Models of Discrete Data (Tran et al., 2019)
    | https://arxiv.org/abs/1905.10347
    | Ciphers with Arbitrary Finite Domains (Black and Rogaway, 2002), on walking a cycle
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflows.representations import is_one_hot, to_indices, to_one_hot

__all__ = ["affine", "affine_inverse", "inverse_table", "next_prime", "unit_mask", "units"]


def _check_modulus(modulus: int) -> None:
    if modulus < 2:
        raise ValueError(
            f"a modulus of {modulus} leaves nothing to transform: "
            "the number of classes must be at least 2"
        )


def _inverse(value: int, modulus: int) -> int:
    """Returns the inverse of a value modulo a modulus, or 0 where there is none (Euclid)."""
    previous, current = modulus, value
    previous_factor, factor = 0, 1
    while current:
        quotient = previous // current
        previous, current = current, previous - quotient * current
        previous_factor, factor = factor, previous_factor - quotient * factor
    return previous_factor % modulus if previous == 1 else 0


@lru_cache(maxsize=64)
def _tabulated_inverses(modulus: int) -> tuple[int, ...]:
    return tuple(_inverse(value, modulus) for value in range(modulus))


@lru_cache(maxsize=256)
def _inverses_on(modulus: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_tabulated_inverses(modulus), device=device)


def inverse_table(modulus: int) -> Tensor:
    """Tabulates the inverses modulo a modulus K.

    Args:
        modulus: K, at least 2.

    Returns:
        Indices (K,); entry s is the inverse of s, and 0 where s is no unit.

    Raises:
        ValueError: If the modulus is below 2.

    Example:
        >>> inverse_table(6)
        tensor([0, 1, 0, 0, 0, 5])
    """
    _check_modulus(modulus)
    return torch.tensor(_tabulated_inverses(modulus))


def unit_mask(modulus: int) -> Tensor:
    """Returns a boolean vector (K,) that is true at the units modulo K.

    Raises:
        ValueError: If the modulus is below 2.
    """
    return inverse_table(modulus) != 0


def units(modulus: int) -> Tensor:
    """Returns the units modulo K in ascending order, shape (φ(K),).

    Raises:
        ValueError: If the modulus is below 2.

    Example:
        >>> units(10)
        tensor([1, 3, 7, 9])
    """
    return unit_mask(modulus).nonzero().squeeze(-1)


def next_prime(value: int) -> int:
    """Returns the smallest prime that is not below a value.

    Example:
        >>> next_prime(50), next_prime(53)
        (53, 53)
    """
    candidate = max(value, 2)
    while any(candidate % divisor == 0 for divisor in range(2, int(candidate**0.5) + 1)):
        candidate += 1
    return candidate


def _map(x: Tensor, loc: Tensor, scale: Tensor, modulus: int, num_classes: int) -> Tensor:
    y = torch.remainder(loc + scale * x, modulus)
    for _ in range(modulus - num_classes):  # at most so many residues lie outside the classes
        y = torch.where(y < num_classes, y, torch.remainder(loc + scale * y, modulus))
    return y


def _map_inverse(y: Tensor, loc: Tensor, scale: Tensor, modulus: int, num_classes: int) -> Tensor:
    inverse = _inverses_on(modulus, scale.device)[scale]
    return _map(y, -inverse * loc, inverse, modulus, num_classes)


class _OneHotAffine(torch.autograd.Function):
    """The affine map on one-hot vectors, with the gradient by three gathers."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        loc: Tensor,
        scale: Tensor,
        modulus: int,
        inverse: bool,
    ) -> Tensor:
        num_classes = value.shape[-1]
        x, mu, sigma = (tensor.argmax(dim=-1) for tensor in (value, loc, scale))
        mapped = (_map_inverse if inverse else _map)(x, mu, sigma, modulus, num_classes)
        ctx.save_for_backward(x, mu, sigma)
        ctx.modulus, ctx.inverse, ctx.num_classes = modulus, inverse, num_classes
        ctx.dtypes = [tensor.dtype for tensor in (value, loc, scale)]
        return to_one_hot(mapped, num_classes, value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, loc, scale = (tensor.unsqueeze(-1) for tensor in ctx.saved_tensors)
        mapping = _map_inverse if ctx.inverse else _map
        residues = torch.arange(ctx.modulus, device=grad.device)
        classes = residues[: ctx.num_classes]
        grads: list[Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[0]:
            entry = mapping(classes, loc, scale, ctx.modulus, ctx.num_classes)
            grads[0] = grad.gather(-1, entry).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            entry = mapping(value, residues, scale, ctx.modulus, ctx.num_classes)
            grads[1] = grad.gather(-1, entry).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            unit = _inverses_on(ctx.modulus, grad.device) != 0
            entry = mapping(
                value, loc, torch.where(unit, residues, 1), ctx.modulus, ctx.num_classes
            )
            grads[2] = grad.gather(-1, entry).masked_fill(~unit, 0).to(ctx.dtypes[2])
        return *grads, None, None


def _check_scale(scale: Tensor, modulus: int) -> None:
    """Refuses scales that are no units; only where the values are at hand without a wait."""
    if torch.compiler.is_compiling() or scale.device.type != "cpu" or not scale.numel():
        return
    if scale.min() < 0 or scale.max() >= modulus:
        raise ValueError(f"a scale lies outside 0..{modulus - 1}: reduce it modulo {modulus}")
    bad = _inverses_on(modulus, scale.device)[scale] == 0
    if bad.any():
        raise ValueError(
            f"a scale of {int(scale[bad][0])} is no unit modulo {modulus}, so the map would not be "
            f"invertible: choose scales among dflows.modular.units({modulus})"
        )


def _apply(
    value: Tensor, loc: Tensor, scale: Tensor, num_classes: int, modulus: int | None, inverse: bool
) -> Tensor:
    modulus = num_classes if modulus is None else modulus
    _check_modulus(modulus)
    if modulus < num_classes:
        raise ValueError(f"a modulus of {modulus} is below the number of classes, {num_classes}")
    _check_scale(to_indices(scale), modulus)
    if is_one_hot(value):
        loc = to_one_hot(loc, modulus, value.dtype)
        scale = to_one_hot(scale, modulus, value.dtype)
        mapped: Tensor = _OneHotAffine.apply(value, loc, scale, modulus, inverse)
        return mapped
    mapping = _map_inverse if inverse else _map
    return mapping(value, to_indices(loc), to_indices(scale), modulus, num_classes)


def affine(
    x: Tensor, loc: Tensor, scale: Tensor, num_classes: int, *, modulus: int | None = None
) -> Tensor:
    r"""Computes :math:`y = (\mu + \sigma x) \bmod M` on indices or one-hot vectors.

    Args:
        x: Indices (…), or one-hot vectors (…, K).
        loc: Indices 0..M-1 (…), or one-hot vectors (…, M), of the same batch shape as `x`.
        scale: Units modulo M, as `loc`.
        num_classes: K.
        modulus: M, at least K; K itself by default. With M > K the map walks its cycle until it
            meets one of the K classes.

    Returns:
        Values of the same kind and shape as `x`. For one-hot vectors the result is exactly one-hot
        and carries the gradient of the multilinear form.

    Raises:
        ValueError: If the modulus is below 2 or below K, or (on the CPU) a scale is no unit.

    Example:
        >>> x = torch.arange(5)
        >>> y = affine(x, torch.tensor(3), torch.tensor(2), num_classes=5)
        >>> y
        tensor([3, 0, 2, 4, 1])
        >>> affine_inverse(y, torch.tensor(3), torch.tensor(2), num_classes=5)
        tensor([0, 1, 2, 3, 4])
    """
    return _apply(x, loc, scale, num_classes, modulus, inverse=False)


def affine_inverse(
    y: Tensor, loc: Tensor, scale: Tensor, num_classes: int, *, modulus: int | None = None
) -> Tensor:
    r"""Computes :math:`x = \sigma^{-1} (y - \mu) \bmod M`, the inverse of :func:`affine`.

    Arguments, result and errors are those of :func:`affine`, with `y` in the place of `x`.
    """
    return _apply(y, loc, scale, num_classes, modulus, inverse=True)
