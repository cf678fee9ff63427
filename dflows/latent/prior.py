"""Distributions of continuous sequences: flows that are autoregressive over time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from dflows.arguments import check_dropout, check_layers, check_positive
from dflows.backbones.stepped_lstm import SteppedLSTM
from dflows.errors import UserError
from dflows.latent.squared import NonlinearSquared
from dflows.representations import full_precision

__all__ = [
    "AutoregressivePrior",
    "FlowPrior",
    "InverseAutoregressivePrior",
    "Univariate",
    "normal_log_prob",
]

Univariate: TypeAlias = Literal["squared", "affine", "spline"]
SPLINE_BINS = 8


def normal_log_prob(noise: Tensor) -> Tensor:
    """Computes the standard normal log-density of vectors (…, features), in nats (…)."""
    return -0.5 * (full_precision(noise).square() + math.log(2 * math.pi)).sum(dim=-1)


def _coupling() -> type[nn.Module]:
    try:
        from zuko.flows.coupling import GeneralCouplingTransform
    except ImportError:
        raise UserError(
            "a prior of continuous flows needs zuko, which is not installed: "
            "pip install 'dflows[latent]'"
        ) from None
    coupling: type[nn.Module] = GeneralCouplingTransform
    return coupling


def _univariate(name: str) -> tuple[Callable[..., Transform], tuple[tuple[int, ...], ...]]:
    """Returns a map of one variable, and the shapes of its parameters."""
    from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform

    known: dict[str, tuple[Callable[..., Transform], tuple[tuple[int, ...], ...]]] = {
        "squared": (NonlinearSquared, ((),) * 5),
        "affine": (MonotonicAffineTransform, ((), ())),
        "spline": (MonotonicRQSTransform, ((SPLINE_BINS,), (SPLINE_BINS,), (SPLINE_BINS - 1,))),
    }
    if name not in known:
        raise UserError(f"univariate is {name!r}: give {', '.join(known)}")
    return known[name]


class FlowPrior(nn.Module, ABC):
    r"""A density of sequences of vectors, whose noise is standard normal.

    Coupling layers over the features map the vector at a position to its noise and back, given the
    state of an LSTM over time: :math:`\epsilon_t = g(z_t; h_t)`. The two priors differ in what the
    LSTM reads, which decides which direction is parallel over time and which goes position by
    position.

    The couplings' networks and maps of one feature are zuko's, except the squared one, which zuko
    lacks. The recurrence over time is written here: zuko's autoregressive transform inverts by
    running its network over the whole sequence for every position, where a cached state makes it
    one step.

    Args:
        features: Entries of the vector at a position, at least 2.
        hidden: Hidden units of a layer of the LSTM.
        layers: Layers of the LSTM.
        couplings: Coupling layers; every other one transforms the first half of the features.
        coupling_width: Units of the two hidden layers of a coupling's network.
        univariate: What a coupling does to one feature: ``squared``
            (:class:`~dflows.latent.NonlinearSquared`), ``affine``, or a rational-quadratic
            ``spline``.
        dropout: Probability that a feature of the LSTM is dropped, between layers and at its end.

    Raises:
        UserError: If a size is out of range, or zuko is not installed.

    References:
        | Latent Normalizing Flows for Discrete Sequences (Ziegler & Rush, 2019), section 4
        | https://arxiv.org/abs/1901.10548
        | Density estimation using Real NVP (Dinh et al., 2017)
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        layers: int = 1,
        couplings: int = 4,
        coupling_width: int = 100,
        univariate: Univariate = "squared",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_layers(layers=layers, couplings=couplings)
        check_positive(hidden=hidden, coupling_width=coupling_width)
        check_dropout(dropout)
        if features < 2:
            raise UserError(f"features is {features}: a coupling splits them, give at least 2")
        self.features = features
        # PyTorch warns of a dropout that a single layer has no place for.
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.start = nn.Parameter(torch.zeros(features))
        coupling = _coupling()
        transform, shapes = _univariate(univariate)
        first = torch.arange(features) < features // 2
        self.couplings = nn.ModuleList(
            coupling(
                features,
                hidden,
                mask=first if number % 2 == 0 else ~first,
                univariate=transform,
                shapes=shapes,
                hidden_features=(coupling_width, coupling_width),
            )
            for number in range(couplings)
        )

    def extra_repr(self) -> str:
        return f"features={self.features}"

    @property
    @abstractmethod
    def parallel(self) -> bool:
        """Whether sampling is parallel over time; if not, the density is."""

    @abstractmethod
    def transform(self, noise: Tensor) -> Tensor:
        """Maps noise (B, T, features) to a sequence (B, T, features)."""

    @abstractmethod
    def inv(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Maps a sequence (B, T, features) to its noise, and to the log-determinants (B, T)."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Computes the log-density of sequences.

        Args:
            z: Sequences (B, T, features).

        Returns:
            Log-densities (B,), in nats.
        """
        noise, log_det = self.inv(z)
        return (normal_log_prob(noise) + log_det).sum(dim=-1)

    def passes(self, length: int) -> int:
        """Returns the evaluations, one after the other, that sampling a sequence takes."""
        return 1 if self.parallel else length

    def _states(self, sequence: Tensor) -> Tensor:
        """Returns the state of the LSTM before every position, (B, T, hidden)."""
        start = self.start.expand(len(sequence), 1, -1)
        states: Tensor = self.dropout(self.lstm(torch.cat([start, sequence[:, :-1]], dim=1))[0])
        return states

    def _to_noise(self, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        log_det = full_precision(z.new_zeros(z.shape[:-1]))
        for number, coupling in enumerate(self.couplings):
            kept, changed = self._halves(z, number)
            changed, change = self._map(coupling, state, kept).call_and_ladj(changed)
            z, log_det = self._joined(kept, changed, number), log_det + change
        return z, log_det

    def _from_noise(self, noise: Tensor, state: Tensor) -> Tensor:
        for number, coupling in reversed(list(enumerate(self.couplings))):
            kept, changed = self._halves(noise, number)
            noise = self._joined(kept, self._map(coupling, state, kept).inv(changed), number)
        return noise

    @staticmethod
    def _map(coupling: nn.Module, state: Tensor, kept: Tensor) -> Any:
        return coupling.meta(state, kept)  # type: ignore[operator]

    # A coupling of zuko looks its mask up and copies by index at every call; halves are slices.
    def _halves(self, vectors: Tensor, number: int) -> tuple[Tensor, Tensor]:
        half = self.features // 2
        first, second = vectors[..., :half], vectors[..., half:]
        return (first, second) if number % 2 == 0 else (second, first)

    @staticmethod
    def _joined(kept: Tensor, changed: Tensor, number: int) -> Tensor:
        return torch.cat((kept, changed) if number % 2 == 0 else (changed, kept), dim=-1)

    def _steps(self, batch_size: int) -> Callable[[Tensor], Tensor]:
        """Returns what :meth:`_states` computes, one row (B, features) after the other."""
        lstm = SteppedLSTM(self.lstm, batch_size)
        return lambda row: self.dropout(lstm.step(row))


class AutoregressivePrior(FlowPrior):
    """Creates the prior AF/SCF, whose state reads the sequence: z_t given all z before it.

    Its density is parallel over time; sampling goes position by position. Its arguments are those
    of :class:`FlowPrior`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> prior = AutoregressivePrior(features=4, hidden=8)
        >>> noise = torch.randn(2, 5, 4)
        >>> again, _ = prior.inv(prior.transform(noise))
        >>> torch.allclose(again, noise, atol=1e-4), prior.passes(5)
        (True, 5)
    """

    @property
    def parallel(self) -> bool:
        return False

    def transform(self, noise: Tensor) -> Tensor:
        state = self._steps(len(noise))
        before = self.start.expand(len(noise), -1)
        sequence = []
        for row in noise.unbind(1):
            before = self._from_noise(row, state(before))
            sequence.append(before)
        return torch.stack(sequence, dim=1)

    def inv(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._to_noise(z, self._states(z))


class InverseAutoregressivePrior(FlowPrior):
    """Creates the prior IAF/SCF, whose state reads the noise: z_t given all noise before it.

    Sampling is parallel over time; the density goes position by position. Its arguments are those
    of :class:`FlowPrior`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> prior = InverseAutoregressivePrior(features=4, hidden=8)
        >>> noise = torch.randn(2, 5, 4)
        >>> again, _ = prior.inv(prior.transform(noise))
        >>> torch.allclose(again, noise, atol=1e-4), prior.passes(5)
        (True, 1)
    """

    @property
    def parallel(self) -> bool:
        return True

    def transform(self, noise: Tensor) -> Tensor:
        return self._from_noise(noise, self._states(noise))

    def inv(self, z: Tensor) -> tuple[Tensor, Tensor]:
        state = self._steps(len(z))
        before = self.start.expand(len(z), -1)
        noise, log_det = [], []
        for row in z.unbind(1):
            before, change = self._to_noise(row, state(before))
            noise.append(before)
            log_det.append(change)
        return torch.stack(noise, dim=1), torch.stack(log_det, dim=1)
