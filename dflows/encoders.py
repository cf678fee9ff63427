"""Encoders: from the context of a conditional flow to features.

An encoder is any module that maps a batch of contexts to vectors (B, C) or sequences (B, S, C).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.arguments import check_layers, check_positive
from dflows.errors import UserError
from dflows.representations import lstm_autocast

__all__ = ["SequenceEncoder"]


class SequenceEncoder(nn.Module):
    """Creates an encoder of sequences of classes that reads each by an LSTM.

    One LSTM reads the sequences separately. The features of a position are a linear map of the
    embeddings and the LSTM's outputs there, of all sequences. They can be aligned with the
    dimensions of a flow, or set in front of them.

    Args:
        num_classes: Classes of an entry.
        features: Features C of a position.
        sequences: Number of sequences, M.
        bidirectional: Whether to read both ways; otherwise a position sees nothing to its right.
        hidden: Hidden units of the LSTM in each direction; as many as `features` by default.
        layers: Number of layers.

    Raises:
        UserError: If a size is below 1.

    References:
        | Long Short-Term Memory (Hochreiter & Schmidhuber, 1997)
        | https://doi.org/10.1162/neco.1997.9.8.1735

    Example:
        >>> encoder = SequenceEncoder(num_classes=10, features=8)
        >>> encoder(torch.randint(10, (3, 2, 5))).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        num_classes: int,
        features: int,
        sequences: int = 2,
        bidirectional: bool = False,
        hidden: int | None = None,
        layers: int = 1,
    ) -> None:
        super().__init__()
        hidden = features if hidden is None else hidden
        check_layers(layers=layers)
        check_positive(
            num_classes=num_classes, features=features, sequences=sequences, hidden=hidden
        )
        self.num_classes = num_classes
        self.sequences = sequences
        self.embedding = nn.Embedding(num_classes, features)
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True, bidirectional=bidirectional)
        read = features + hidden * (2 if bidirectional else 1)
        self.linear = nn.Linear(sequences * read, features)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, sequences={self.sequences}"

    def forward(self, context: Tensor) -> Tensor:
        """Encodes sequences.

        Args:
            context: Classes, integers (B, M, S).

        Returns:
            Features (B, S, C).

        Raises:
            UserError: If the shape or type does not fit, or a class is out of range (checked on a
                CPU only).
        """
        if context.ndim != 3 or context.shape[1] != self.sequences:
            raise UserError(
                f"a context {tuple(context.shape)} was given: give {self.sequences} sequences an "
                f"example, (batch, {self.sequences}, length)"
            )
        if context.is_floating_point():
            raise UserError(f"the context holds {context.dtype}: give classes, as integers")
        if context.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = (context < 0) | (context >= self.num_classes)
            if outside.any():
                raise UserError(
                    f"the context has the class {int(context[outside][0])}, outside of "
                    f"0..{self.num_classes - 1}: give the encoder num_classes, or other data"
                )
        embedded = F.embedding(context.flatten(0, 1), self.embedding.weight)
        with lstm_autocast():
            read = self.lstm(embedded.to(self.embedding.weight.dtype))[0]
        read = torch.cat([embedded, read], dim=-1).unflatten(0, (-1, self.sequences))
        features: Tensor = self.linear(read.transpose(1, 2).flatten(2))
        return features
