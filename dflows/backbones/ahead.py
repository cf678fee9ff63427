"""What a lane sees beyond its end."""

import torch
from torch import Tensor, nn

from dflows.backbones.rows import look_up

__all__ = ["Ahead", "Readout"]

NARROW = 24
"""Features of one dimension ahead."""


class Readout(nn.Sequential):
    """Creates a network of one hidden layer.

    Args:
        inputs: Features in.
        hidden: Hidden units.
        outputs: Features out.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class Ahead(nn.Module):
    """Creates the network that looks at the dimensions beyond the end of a lane.

    It sees them by their distance, each through few features, and tells what it sees twice: to the
    input of the step, and to the features of the dimension.

    Args:
        width: Features of one dimension.
        reach: The largest distance.
        hidden: Hidden units of the network along the lane.
    """

    def __init__(self, width: int, reach: int, hidden: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, NARROW, bias=False)
        self.look = Readout(reach * NARROW, width, width)
        self.steps = nn.Parameter(torch.randn(reach, width) * 0.1)
        self.read = Readout(hidden + width, 2 * width, width)

    def see(self, narrow: Tensor, seen: Tensor, steps: Tensor) -> Tensor:
        """Returns what some dimensions see (B, n, width), which is added to their query.

        Args:
            narrow: Content through few features (B, D + 1, NARROW), zeros at D.
            seen: The dimension (n, reach) at every distance; D where it is not known.
            steps: The distance (n,) of the first that is known.
        """
        looked: Tensor = self.look(look_up(narrow, seen))
        return looked + self.steps[steps - 1]

    def tell(self, hidden: Tensor, looked: Tensor) -> Tensor:
        """Returns what is added to features (B, n, width), given hidden units (B, n, hidden)."""
        told: Tensor = self.read(torch.cat([hidden, looked.to(hidden.dtype)], dim=-1))
        return told
