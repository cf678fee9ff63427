"""The map of one continuous variable that the latent flows' paper rests on."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

__all__ = ["NonlinearSquared"]

STEEPEST = 8 * math.sqrt(3) / 9
"""1 over the largest slope of 1 / (1 + u²): the bump may be so high and the map still rises."""

HEIGHT = 0.97
"""The bump's largest height as a part of that: the least slope is 0.03 of the line's."""

SCALES = math.log(1e2)
NEWTON_STEPS = 4
FAR = 1e3
"""Beyond this the bump is flat, and the sixth power of the root would leave float32."""


class NonlinearSquared(Transform):
    r"""Creates the non-linear squared transformation, a line with a bump.

    .. math:: f(x) = a + b x + \frac{c}{1 + (d x + g)^2}

    with b and d positive and c so small that f rises. A standard normal variable seen through the
    inverse may have two modes, which an affine map of it never has. The inverse is the root of a
    cubic, in closed form, and polished by Newton's rule, since the closed form cancels.

    Args:
        shift: a (…).
        scale: log b, softly clipped (…).
        height: c before it is bounded (…).
        bump_scale: log d, softly clipped (…).
        bump_shift: g (…).
        kwargs: Keyword arguments of :class:`torch.distributions.Transform`.

    References:
        Latent Normalizing Flows for Discrete Sequences (Ziegler & Rush, 2019), section 4.4,
        arXiv:1901.10548

    Example:
        >>> _ = torch.manual_seed(0)
        >>> transform = NonlinearSquared(*torch.randn(5, 3))
        >>> x = torch.randn(3)
        >>> torch.allclose(transform.inv(transform(x)), x, atol=1e-5)
        True
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(
        self,
        shift: Tensor,
        scale: Tensor,
        height: Tensor,
        bump_scale: Tensor,
        bump_shift: Tensor,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.shift = shift
        self.log_scale = _clip(scale)
        self.scale = self.log_scale.exp()
        self.bump_scale = _clip(bump_scale).exp()
        self.bump_shift = bump_shift
        # In units of the line's rise over the bump's width.
        self.relative_height = HEIGHT * STEEPEST * height.tanh()

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f(x) and the logarithm of its slope, as zuko's transforms do."""
        u = self.bump_scale * x + self.bump_shift
        lorentzian = 1 / (1 + u.square())
        height = self.relative_height * lorentzian
        y = self.shift + self.scale * (x + height / self.bump_scale)
        return y, self.log_scale + torch.log1p(-2 * u * height * lorentzian)

    def _inverse(self, y: Tensor) -> Tensor:
        # With u = d x + g the equation is u + k / (1 + u²) = r, a cubic of one real root.
        k = self.relative_height
        r = self.bump_scale * ((y - self.shift) / self.scale) + self.bump_shift
        near = r.clamp(-FAR, FAR)
        u = _root(near, k) + (r - near)
        for _ in range(NEWTON_STEPS):
            squared = 1 + u.square()
            slope = 1 - 2 * k * u / squared.square()
            u = u - (u + k / squared - r) / slope
        return (u - self.bump_shift) / self.bump_scale

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]


def _clip(scale: Tensor) -> Tensor:
    return scale / (1 + scale.abs() / SCALES)


def _root(r: Tensor, k: Tensor) -> Tensor:
    """Returns the root of u³ − r u² + u + k − r by Cardano's formula, to some digits."""
    p = 1 - r.square() / 3
    q = k - 2 * r * (1 + r.square() / 9) / 3
    root = ((q / 2).square() + (p / 3) ** 3).clamp(min=0).sqrt()
    w = torch.where(q > 0, -1, 1) * (q.abs() / 2 + root).clamp(min=1e-30) ** (1 / 3)
    return r / 3 + w - p / (3 * w)
