"""The discretized mixture of Gaussians: two dimensions, many classes, a few modes."""

import math
from typing import Literal

import torch
from torch import Tensor

from datamodules.enumerable import EnumerableDataModule
from dflows.arguments import check_layers
from dflows.errors import UserError

__all__ = ["MixtureDataModule"]


class MixtureDataModule(EnumerableDataModule):
    r"""Creates samples from a mixture of Gaussians over the plane, discretized in K × K bins.

    The plane is the square :math:`[0, K]^2` and its bins have side 1, so that class k of either
    dimension has its centre at :math:`k + 1/2`. The probability of a bin is proportional to the
    density at its centre,

    .. math:: p(y) \propto \sum_m \exp\Big(-\frac{\|y + \frac12 - c_m\|^2}{2 s^2}\Big),

    with :math:`s` the deviation and :math:`c_m` the centres of modes of equal weight, around the
    middle of the square. On the circle mode m is at the angle :math:`2\pi m/M`, counted from the
    axis of the first dimension. On the grid modes are at equal distances from side to side of a
    square, whose sides are at `radius` from the middle.

    Args:
        num_classes: The number of bins of a side, K.
        arrangement: `circle`, or `grid`: n × n modes, or one less where n is odd, when the one in
            the middle is left out.
        modes: The number of modes, M. A grid has 4, 8, 9, 16, 24, 25, …
        radius: The circle's radius or half the grid's side, as a share of K.
        deviation: The standard deviation of a mode in each direction, as a share of K.
        batch_size: The samples of a training batch, in each process.
        eval_batch_size: The samples of an evaluation batch, in each process.
        eval_examples: The samples of the validation split, and of the test split.
        num_workers: The worker processes of each loader.
        seed: Every seed has samples of its own, of the same distribution.

    Raises:
        UserError: If an argument is out of range, or there are more states than can be held.

    References:
        | Discrete Flows: Invertible Generative Models of Discrete Data (Tran et al., 2019)
        | https://arxiv.org/abs/1905.10347

    Example:
        >>> data = MixtureDataModule()
        >>> round(data.entropy, 3), round(data.factorized_entropy - data.entropy, 3)
        (7.233, 0.732)
        >>> data.centres[:3]
        tensor([[74.6200, 45.5000],
                [66.0909, 66.0909],
                [45.5000, 74.6200]], dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int = 91,
        arrangement: Literal["circle", "grid"] = "circle",
        modes: int = 8,
        radius: float = 0.32,
        deviation: float = 0.035,
        batch_size: int = 256,
        eval_batch_size: int = 1024,
        *,
        eval_examples: int = 10_000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            2,
            num_classes,
            batch_size,
            eval_batch_size,
            eval_examples=eval_examples,
            num_workers=num_workers,
            seed=seed,
        )
        if arrangement not in ("circle", "grid"):
            raise UserError(f'arrangement is "{arrangement}": give "circle" or "grid"')
        check_layers(modes=modes)
        if not 0 <= radius < math.inf:
            raise UserError(f"radius must be finite and not negative, not {radius}")
        if not 0 < deviation < math.inf:
            raise UserError(f"deviation must be finite and positive, not {deviation}")
        offsets = _circle(modes) if arrangement == "circle" else _grid(modes)
        self.centres = num_classes * (0.5 + radius * offsets)
        """The modes' centres in the plane, float64, shape (M, 2)."""
        self._deviation = num_classes * deviation

    def tabulate(self) -> Tensor:
        bins = torch.arange(self.num_classes, dtype=torch.double) + 0.5
        # In logarithms: however narrow the modes are, the nearest bins have some density.
        density = torch.full((self.num_classes, self.num_classes), -math.inf, dtype=torch.double)
        for centre in self.centres:
            first, second = -0.5 * ((bins - centre.unsqueeze(-1)) / self._deviation) ** 2
            density = torch.logaddexp(density, first.unsqueeze(-1) + second)
        return density.flatten().softmax(0).reshape(density.shape)


def _circle(modes: int) -> Tensor:
    angles = 2 * math.pi / modes * torch.arange(modes, dtype=torch.double)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def _grid(modes: int) -> Tensor:
    side = math.isqrt(modes)
    hollow = side * side != modes
    side += hollow
    if modes == 1 or (hollow and (side % 2 == 0 or modes != side * side - 1)):
        raise UserError(
            f"a grid cannot have {modes} modes: give n * n of them, with n at least 2, or one less "
            "for an odd n (4, 8, 9, 16, 24, 25, …)"
        )
    line = torch.linspace(-1, 1, side, dtype=torch.double)
    offsets = torch.cartesian_prod(line, line)
    return offsets[torch.arange(len(offsets)) != modes // 2] if hollow else offsets
