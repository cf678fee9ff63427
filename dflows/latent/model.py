"""A latent-variable model of sequences: a flow as prior, a factorized emission, bounds."""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from dflows.backbones import Backbone
from dflows.errors import UserError
from dflows.latent.prior import FlowPrior, normal_log_prob

__all__ = ["LatentFlow", "Terms"]


class Terms(NamedTuple):
    """The parts of the likelihood's estimate, for every draw of the latent sequence (S, B).

    `log_emission` is log p(y | z) and `divergence` log q(z | y) − log p(z), in nats.
    """

    log_emission: Tensor
    divergence: Tensor

    def bound(self, kl_weight: float = 1.0) -> Tensor:
        """Returns the evidence lower bound (B,), its divergence weighted."""
        return (self.log_emission - kl_weight * self.divergence).mean(dim=0)

    def importance_bound(self) -> Tensor:
        """Returns the importance-weighted bound (B,), which S raises towards the likelihood."""
        weight = self.log_emission - self.divergence
        return weight.logsumexp(dim=0) - math.log(len(weight))


class LatentFlow(nn.Module):
    r"""Creates a model of sequences whose positions are independent given a latent sequence.

    .. math:: p(y) = \int p(z) \prod_t p(y_t \mid z) \, dz

    with a vector of z a position, a flow p(z), and, to train by, the posterior
    :math:`q(z \mid y) = \prod_t \mathcal{N}(z_t; \mu_t(y), \sigma_t(y))`. The likelihood is not
    known: there is the evidence lower bound, and the importance-weighted bound of S draws, which
    is between that and the likelihood.

    Windows of a text have no length to tell of, so that neither network is told the position, as
    the paper's are.

    Arguments:
        num_classes: K.
        length: D, the largest number of positions.
        prior: The density of z.
        inference: The network behind q, from features (B, T, width) to features (B, T, width) that
            see all positions.
        emission: The network behind p(y | z), likewise.
        width: Features of one position, where a network does not tell its own.

    Raises:
        UserError: If a network's width is unknown, or it is level-causal and would not see all.

    References:
        | Latent Normalizing Flows for Discrete Sequences (Ziegler & Rush, 2019)
        | https://arxiv.org/abs/1901.10548
        | Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519

    Example:
        >>> from dflows.backbones import LSTM
        >>> from dflows.latent import AutoregressivePrior
        >>> _ = torch.manual_seed(0)
        >>> network = lambda: LSTM(width=8, bidirectional=True)
        >>> model = LatentFlow(5, 6, AutoregressivePrior(4, 8), network(), network())
        >>> y = torch.randint(5, (2, 6))
        >>> terms = model.terms(y, num_draws=3)
        >>> terms.bound().shape, bool((terms.bound() <= terms.importance_bound()).all())
        (torch.Size([2]), True)
        >>> model.sample(2).shape, model.passes
        (torch.Size([2, 6]), 7)
    """

    def __init__(
        self,
        num_classes: int,
        length: int,
        prior: FlowPrior,
        inference: nn.Module,
        emission: nn.Module,
        *,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.length = length
        self.prior = prior
        self.inference = inference
        self.emission = emission
        seen = _width("inference", inference, width)
        given = _width("emission", emission, width)
        self.embedding = nn.Embedding(num_classes, seen)
        self.posterior = nn.Linear(seen, 2 * prior.features)
        self.latent = nn.Linear(prior.features, given)
        self.head = nn.Linear(given, num_classes)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, length={self.length}"

    @property
    def passes(self) -> int:
        """Network evaluations, one after the other, that drawing a batch takes."""
        return self.prior.passes(self.length) + 1

    def terms(self, y: Tensor, num_draws: int = 1, generator: Generator | None = None) -> Terms:
        """Draws latent sequences of the posterior and computes what bounds are made of.

        Args:
            y: Indices (B, d); d below D is an event of its own.
            num_draws: S.
            generator: Source of randomness.

        Returns:
            The terms, each (S, B), in nats.

        Raises:
            UserError: If there are no draws, or `y` has more positions than the model.
        """
        if num_draws < 1:
            raise UserError(f"num_draws is {num_draws}: give at least 1")
        self._check_length(y.shape[-1])
        batch, length = y.shape
        found = self.posterior(self.inference(self.embedding(y))).to(self.head.weight.dtype)
        loc, log_scale = found.chunk(2, dim=-1)
        shape = (num_draws, *loc.shape)
        noise = torch.randn(shape, dtype=loc.dtype, device=loc.device, generator=generator)
        z = (loc + log_scale.exp() * noise).flatten(0, 1)
        log_posterior = (normal_log_prob(noise) - log_scale.sum(dim=-1)).sum(dim=-1)
        with torch.autocast(z.device.type, enabled=False):
            log_prior = self.prior.log_prob(z).unflatten(0, (num_draws, batch))
        log_probs = self.logits(z).log_softmax(dim=-1).unflatten(0, (num_draws, batch))
        index = y.unsqueeze(-1).expand(num_draws, batch, length, 1)
        log_emission = log_probs.gather(-1, index).squeeze(-1).sum(dim=-1)
        return Terms(log_emission, log_posterior - log_prior)

    def logits(self, z: Tensor) -> Tensor:
        """Returns the logits (B, T, K) of every position given a latent sequence (B, T, …)."""
        features = self.latent(z)
        logits: Tensor = self.head(features + self.emission(features))
        return logits.to(self.head.weight.dtype)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        *,
        length: int | None = None,
        temperature: float = 1.0,
        generator: Generator | None = None,
    ) -> Tensor:
        """Draws sequences.

        Args:
            num_samples: N.
            length: Positions; all D where it is not given.
            temperature: Divides the logits of the emission, and the log-density of the prior's
                noise.
            generator: Source of randomness.

        Returns:
            Indices (N, length).

        Raises:
            UserError: If the temperature or the length cannot be had.
        """
        if not 0 < temperature < math.inf:
            raise UserError(f"temperature is {temperature}: give a positive number")
        length = self.length if length is None else length
        self._check_length(length)
        weight = self.head.weight
        shape = (num_samples, length, self.prior.features)
        noise = torch.randn(shape, dtype=weight.dtype, device=weight.device, generator=generator)
        uniform = torch.rand(num_samples, length, 1, device=weight.device, generator=generator)
        with torch.autocast(noise.device.type, enabled=False):
            z = self.prior.transform(noise * math.sqrt(temperature))
        cumulative = (self.logits(z) / temperature).softmax(dim=-1).cumsum(dim=-1)
        return (cumulative[..., :-1] <= uniform * cumulative[..., -1:]).sum(dim=-1)

    def _check_length(self, length: int) -> None:
        if not 1 <= length <= self.length:
            raise UserError(
                f"an event of {length} dimensions was given, and the model has {self.length}: "
                "give 1 to that many"
            )


def _width(key: str, network: nn.Module, width: int | None) -> int:
    if isinstance(network, Backbone):
        if network.level_causal:
            raise UserError(
                f"the {key} network, a {type(network).__name__}, is level-causal, and every "
                "position must see all others: take an LSTM with bidirectional=True, say"
            )
        return network.width
    if width is None:
        raise UserError(
            f"the width of the {key} network, a {type(network).__name__}, is not known: give "
            "`width`, the last dimension of the features that it takes and returns"
        )
    return width
