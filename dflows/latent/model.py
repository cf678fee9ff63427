"""A latent-variable model of sequences: a flow as prior, a factorized emission, bounds."""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from dflows.arguments import check_dimensions, check_temperature
from dflows.backbones import Backbone, as_backbone
from dflows.categorical import inverse_cdf
from dflows.errors import UserError
from dflows.latent.prior import FlowPrior, normal_log_prob
from dflows.representations import check_logits, exactly, full_precision

__all__ = ["LatentFlow", "Terms"]


class Terms(NamedTuple):
    """The parts of the likelihood's estimate, for every sample of the latent sequence (S, B).

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

    with a vector of z for every position, a flow p(z), and, for training, the posterior
    :math:`q(z \mid y) = \prod_t \mathcal{N}(z_t; \mu_t(y), \sigma_t(y))`. The likelihood is
    intractable: there is the evidence lower bound, and the importance-weighted bound of S samples,
    which lies between that and the likelihood.

    Windows of a text all have one length, so that neither network gets the position as an input, as
    the paper's do.

    Args:
        num_classes: K.
        length: D, the largest number of positions.
        prior: The density of z.
        inference: The network behind q, from features (B, T, width) to features (B, T, width) that
            see all positions. A network without an attribute `width` is wrapped in
            :class:`~dflows.backbones.Masked`.
        emission: The network behind p(y | z), likewise.

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
        >>> terms = model.terms(y, num_samples=3)
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
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.length = check_dimensions(length)
        self.prior = prior
        self.inference = _sees_all("inference", inference)
        self.emission = _sees_all("emission", emission)
        seen, given = self.inference.width, self.emission.width
        self.embedding = nn.Embedding(num_classes, seen)
        self.posterior = nn.Linear(seen, 2 * prior.features)
        self.latent = nn.Linear(prior.features, given)
        self.head = nn.Linear(given, num_classes)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, length={self.length}"

    @property
    def passes(self) -> int:
        """Network evaluations, one after the other, that sampling a batch takes."""
        return self.prior.passes(self.length) + 1

    def terms(self, y: Tensor, num_samples: int = 1, generator: Generator | None = None) -> Terms:
        """Samples latent sequences from the posterior and computes the terms of the bounds.

        Args:
            y: Indices (B, d); d below D is an event of its own.
            num_samples: S.
            generator: Source of randomness.

        Returns:
            The terms, each (S, B), in nats.

        Raises:
            UserError: If `num_samples` is below 1, or `y` has more positions than the model.
        """
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}: give at least 1")
        self._check_dimensions(y.shape[-1])
        with exactly(y.device):
            return self._terms(y, num_samples, generator)

    def _terms(self, y: Tensor, num_samples: int, generator: Generator | None) -> Terms:
        batch, length = y.shape
        found = self.posterior(self.inference(self.embedding(y))).to(self.head.weight.dtype)
        loc, log_scale = found.chunk(2, dim=-1)
        shape = (num_samples, *loc.shape)
        noise = torch.randn(shape, dtype=loc.dtype, device=loc.device, generator=generator)
        z = (loc + log_scale.exp() * noise).flatten(0, 1)
        log_posterior = (normal_log_prob(noise) - full_precision(log_scale).sum(dim=-1)).sum(dim=-1)
        with torch.autocast(z.device.type, enabled=False):
            log_prior = self.prior.log_prob(z).unflatten(0, (num_samples, batch))
        log_probs = self.logits(z).log_softmax(dim=-1).unflatten(0, (num_samples, batch))
        index = y.unsqueeze(-1).expand(num_samples, batch, length, 1)
        log_emission = log_probs.gather(-1, index).squeeze(-1).sum(dim=-1)
        return Terms(log_emission, log_posterior - log_prior)

    def logits(self, z: Tensor) -> Tensor:
        """Returns the logits (B, T, K) of every position given a latent sequence (B, T, …).

        Raises:
            NonFiniteError: If they are not finite.
        """
        features = self.latent(z)
        logits: Tensor = self.head(features + self.emission(features))
        return check_logits(logits.to(self.head.weight.dtype), type(self).__name__)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        *,
        length: int | None = None,
        temperature: float = 1.0,
        generator: Generator | None = None,
    ) -> Tensor:
        """Samples sequences.

        Args:
            num_samples: N.
            length: Positions; all D where it is not given.
            temperature: Divides the logits of the emission, and the log-density of the prior's
                noise.
            generator: Source of randomness.

        Returns:
            Indices (N, length).

        Raises:
            UserError: If the temperature or the length is out of range.
        """
        check_temperature(temperature)
        length = self.length if length is None else length
        self._check_dimensions(length)
        weight = self.head.weight
        shape = (num_samples, length, self.prior.features)
        noise = torch.randn(shape, dtype=weight.dtype, device=weight.device, generator=generator)
        uniform = torch.rand(
            shape[:2], dtype=torch.float, device=weight.device, generator=generator
        )
        with exactly(noise.device):
            z = self.prior.transform(noise * math.sqrt(temperature))
            return inverse_cdf(uniform, logits=self.logits(z), temperature=temperature)

    def _check_dimensions(self, length: int) -> None:
        if not 1 <= length <= self.length:
            raise UserError(
                f"an event of {length} dimensions was given, and the model has {self.length}: "
                "give 1 to that many"
            )


def _sees_all(key: str, network: nn.Module) -> Backbone:
    backbone = as_backbone(network)
    if backbone.level_causal:
        raise UserError(
            f"the {key} network, a {type(network).__name__}, is level-causal, and every position "
            "must see all others: take an LSTM with bidirectional=True, say"
        )
    return backbone
