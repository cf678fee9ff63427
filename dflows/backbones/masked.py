"""Any network as a backbone."""

from torch import Tensor, nn

from dflows.backbones.backbone import Backbone
from dflows.backbones.checks import check_features
from dflows.errors import UserError

__all__ = ["Masked", "as_backbone"]


class Masked(Backbone):
    """Creates a backbone of any module from features (B, D, width) to features (B, D, width).

    The conditioner masks beforehand what the module must not see, one evaluation a level, and tells
    it the positions.

    Args:
        network: The module, ``torch.nn.TransformerEncoder(..., batch_first=True)`` for example.
        width: Features of one dimension; the network's attribute `width` where not given.

    Raises:
        UserError: If the width is unknown or not the network's own, or the network is a backbone
            already.

    Example:
        >>> import torch
        >>> backbone = Masked(nn.Sequential(nn.Linear(8, 8), nn.GELU()), width=8)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    knows_positions = False

    def __init__(self, network: nn.Module, width: int | None = None) -> None:
        name = type(network).__name__
        if isinstance(network, Backbone):
            raise UserError(f"{name} is a backbone already: hand it over as it is")
        own = getattr(network, "width", None)
        given = [size for size in (width, own) if isinstance(size, int)]
        if not given:
            raise UserError(
                f"the width of a {name} is not known: give it an attribute `width`, the last "
                "dimension of the features that it takes and returns, or wrap it: "
                "Masked(network, width=64)"
            )
        if len(set(given)) > 1:
            raise UserError(f"width is {width} and the {name}'s own is {own}: leave `width` away")
        super().__init__(given[0], level_causal=False)
        self.network = network

    @property
    def display_name(self) -> str:
        return type(self.network).__name__

    def extra_repr(self) -> str:
        return f"width={self.width}"

    def forward(
        self, content: Tensor, query: Tensor | None = None, levels: Tensor | None = None
    ) -> Tensor:
        check_features(self, content)
        features = self.network(content)
        if not isinstance(features, Tensor) or features.shape != content.shape:
            found = (
                tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            )
            raise UserError(
                f"{type(self.network).__name__} returned {found} for features "
                f"{tuple(content.shape)}: a backbone must keep (batch, length, width)"
            )
        return features


def as_backbone(module: nn.Module) -> Backbone:
    """Returns a backbone as it is, and any other module in :class:`Masked`.

    Raises:
        UserError: If the width of another module is unknown.
    """
    return module if isinstance(module, Backbone) else Masked(module)
