"""PyTorch's LSTM, one position at a time."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflows.representations import lstm_autocast

__all__ = ["SteppedLSTM"]


class SteppedLSTM:
    """Creates the state of an LSTM that reads one row after the other, zeros at first.

    An ``nn.LSTM`` called for one position at a time costs many times as much.

    Args:
        lstm: The LSTM, of one direction.
        batch_size: B.
    """

    def __init__(self, lstm: nn.LSTM, batch_size: int) -> None:
        self.lstm = lstm
        self.weights = lstm.all_weights
        zeros = self.weights[0][0].new_zeros(batch_size, lstm.hidden_size)
        self.hidden = [zeros] * lstm.num_layers
        self.cells = [zeros] * lstm.num_layers

    def step(self, row: Tensor) -> Tensor:
        """Reads a row (B, features) and returns the hidden state (B, hidden) of the last layer."""
        lstm = self.lstm
        # In the precision of a whole pass.
        with lstm_autocast():
            x = row.to(self.hidden[0].dtype)
            for layer, weights in enumerate(self.weights):
                state = self.hidden[layer], self.cells[layer]
                x, self.cells[layer] = torch.lstm_cell(x, state, *weights)
                self.hidden[layer] = x
                if lstm.dropout and layer + 1 < lstm.num_layers:
                    x = F.dropout(x, lstm.dropout, lstm.training)
        return x
