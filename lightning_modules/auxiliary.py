"""Losses that help a deep language model to train, and have no part in its likelihood."""

from dataclasses import dataclass

from torch import Tensor, nn

from dflows.errors import UserError
from dflows.representations import full_precision

__all__ = ["Auxiliary", "AuxiliaryHeads"]


@dataclass(frozen=True)
class Auxiliary:
    """Creates the settings of auxiliary losses.

    Args:
        layers: Whether every layer predicts, not the last alone. Layer l of n does so until the
            part `until` · l / n of the training is done.
        until: The part of the training in which the layers do.
        targets: How many characters each position predicts, the next one included.
        target_weight: Weight of the losses of characters after the next.

    Raises:
        UserError: If a number is out of range, or nothing is left to add.

    References:
        | Character-Level Language Modeling with Deeper Self-Attention (Al-Rfou et al., 2018),
          section 2
        | https://arxiv.org/abs/1808.04444
    """

    layers: bool = True
    until: float = 0.5
    targets: int = 2
    target_weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise UserError(f"auxiliary.until is {self.until}: give a part above 0, up to 1")
        if self.targets < 1:
            raise UserError(f"auxiliary.targets is {self.targets}: give at least 1")
        if not self.target_weight > 0:
            raise UserError(
                f"auxiliary.target_weight is {self.target_weight}: give a positive number"
            )
        if not self.layers and self.targets == 1:
            raise UserError(
                "auxiliary.layers is false and auxiliary.targets is 1, which adds no loss: set "
                "one of the two, or leave `auxiliary` away"
            )


class AuxiliaryHeads(nn.Module):
    r"""Creates the classifiers of auxiliary losses, one for every layer and target.

    Position d, which knows the characters before d, predicts those at d, d + 1, … . Of n layers and
    T targets it adds to the log-likelihood

    .. math:: \sum_{l, t} w^{[t > 0]} \sum_d \log p_{l,t}(y_{d+t} \mid y_{<d}),

    save l = n, t = 0, which is the likelihood itself.

    Args:
        num_classes: K.
        width: Features of one dimension.
        layers: Layers whose features come, the last included.
        settings: Which losses there are.

    Example:
        >>> import torch
        >>> heads = AuxiliaryHeads(num_classes=5, width=8, layers=3, settings=Auxiliary())
        >>> features = [torch.randn(2, 6, 8)] * 3
        >>> heads(features, torch.randint(5, (2, 6)), progress=0.0).shape
        torch.Size([2])
    """

    def __init__(self, num_classes: int, width: int, layers: int, settings: Auxiliary) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.settings = settings
        targets = settings.targets
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, targets * num_classes))
            for _ in range(layers - 1 if settings.layers else 0)
        )
        self.last = nn.Linear(width, (targets - 1) * num_classes) if targets > 1 else None

    def forward(self, features: list[Tensor], y: Tensor, progress: float) -> Tensor:
        """Computes what is added to the log-likelihood.

        Args:
            features: Features (N, D, width) after every layer.
            y: Indices (N, D).
            progress: The part of the training that is done.

        Returns:
            Weighted sums of log-likelihoods (N,), nats.
        """
        parts = []
        for layer, head in enumerate(self.layers):
            if progress < self.settings.until * (layer + 1) / len(features):
                parts.append(self._scores(head(features[layer]), y, first=0))
            else:
                # Parameters without a gradient would keep several processes waiting.
                parts += [0 * parameter.sum() for parameter in head.parameters()]
        if self.last is not None:
            parts.append(self._scores(self.last(features[-1]), y, first=1))
        return sum(parts, start=features[-1].new_zeros(len(y)))

    def _scores(self, logits: Tensor, y: Tensor, first: int) -> Tensor:
        """Scores the targets from number `first` on by their logits (N, D, n·K)."""
        logits = logits.unflatten(-1, (-1, self.num_classes))
        log_probs = full_precision(logits).log_softmax(dim=-1)
        total = log_probs.new_zeros(len(y))
        for number in range(log_probs.shape[-2]):
            offset = number + first
            known = y[:, offset:].unsqueeze(-1)
            score = log_probs[:, : known.shape[1], number].gather(-1, known).sum(dim=(1, 2))
            total = total + (self.settings.target_weight if offset else 1.0) * score
        return total
