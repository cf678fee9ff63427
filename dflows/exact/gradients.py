r"""The exact gradients that estimators stand for, and how far from them each estimator is.

Let every transform of a flow draw the map of every dimension from the softmax of its logits, as
:class:`~dflows.estimators.ReinMax` does, so that data y lead to x with a probability
:math:`P(x \mid y)`. A softmax straight-through estimator stands for a softmax of its own
temperature, and all others for that of temperature 1. Two objectives then have gradients:

.. math::

    J = \sum_y p(y) \sum_x P(x \mid y) \log q(x), \qquad
    L = \sum_y p(y) \log \sum_x P(x \mid y)\, q(x).

Straight-through estimators estimate the gradient of the expected log-likelihood J, the posterior
rule that of the log-likelihood L of the mixture. Where all states can be enumerated both are
computed here without an estimate, and differentiated by autograd: :math:`P` is a product of Markov
kernels, one a transform, and each kernel a product over dimensions of the distributions of
:math:`x_d` given y. Its :math:`K^{2D}` entries are never held.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dflows.bijections import Bijection
from dflows.errors import UserError
from dflows.estimators import Estimator
from dflows.exact.measures import check_probabilities, states
from dflows.flow import DiscreteFlow
from dflows.representations import to_one_hot
from dflows.transforms import ConditionalTransform, PermutationTransform

__all__ = [
    "GradientComparison",
    "compare_estimators",
    "compare_gradients",
    "expected_log_likelihood",
    "mixture_log_likelihood",
]

BLOCK_ENTRIES = 2**22
"""Largest number of entries that a kernel is contracted over at once: 32 MB."""

ROUND_OFF = 1e-12


def _parts(bijection: Bijection, logits: Tensor) -> list[Tensor]:
    """Returns the logits (N, d, M) of each choice that makes a map."""
    parts = []

    def note(part: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        parts.append(part)
        return to_one_hot(part.argmax(dim=-1), part.shape[-1], part.dtype), ladj

    zeros = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    value = to_one_hot(zeros, bijection.num_classes, logits.dtype)
    bijection.inverse_through(value, logits, logits.new_zeros(logits.shape[0]), note)
    return parts


def _maps(bijection: Bijection) -> tuple[Tensor, Tensor]:
    """Tabulates all maps of a bijection.

    Returns:
        The choices (C, number of parts) that make each map, and the x (C, K) of every y.
    """
    initial = bijection.initial_logits()
    possible = [
        part[0, 0].isfinite().nonzero()[:, 0] for part in _parts(bijection, initial[None, None])
    ]
    choices = torch.cartesian_prod(*possible).reshape(-1, len(possible))
    remaining = iter(choices.T)

    def choose(part: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        chosen = next(remaining).unsqueeze(-1).expand(part.shape[:-1])
        return to_one_hot(chosen, part.shape[-1], part.dtype), ladj

    num_classes = bijection.num_classes
    y = torch.eye(num_classes).expand(len(choices), -1, -1)
    logits = initial.expand(len(choices), num_classes, -1)
    x, _ = bijection.inverse_through(y, logits, initial.new_zeros(len(choices)), choose)
    return choices, x.argmax(dim=-1)


def _kernel(bijection: Bijection, y: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Computes the distributions (N, d, K) of x, given y (N, d) and logits (N, d, num_logits)."""
    choices, table = _maps(copy.deepcopy(bijection).cpu())
    choices, table = choices.to(y.device), table.to(y.device)
    log_probs = logits.new_zeros((), dtype=torch.float64)
    for part, chosen in zip(_parts(bijection, logits), choices.T, strict=True):
        part = part.double() / temperature
        log_probs = log_probs + part.log_softmax(dim=-1)[..., chosen]
    zeros = log_probs.new_zeros(*y.shape, bijection.num_classes)
    return zeros.scatter_add(-1, table.T[y], log_probs.exp())


def _expect(values: Tensor, kernel: Tensor) -> Tensor:
    """Computes the means (N,) of values (K^D,) under distributions (N, D, K)."""
    rows, length, num_classes = kernel.shape
    means = values.reshape(-1, num_classes) @ kernel[:, -1].T
    for dimension in reversed(range(length - 1)):
        means = (means.reshape(-1, num_classes, rows) * kernel[:, dimension].T).sum(dim=1)
    return means.reshape(rows)


def _undone(transform: ConditionalTransform, y: Tensor, values: Tensor) -> Tensor:
    """Computes the means (N,) of values (K^D,) over what y (N, D) is before a transform."""
    kernel = to_one_hot(y, transform.bijection.num_classes, torch.float64)
    moved = (transform.ordering.levels(y.shape[1]) > 0).nonzero()[:, 0].to(y.device)
    logits = transform.conditioner(y)[:, moved]
    temperature = transform.estimator.map_temperature
    drawn = _kernel(transform.bijection, y[:, moved], logits, temperature)
    kernel = kernel.index_copy(1, moved, drawn)
    return _expect(values, kernel)


def _through_all(flow: DiscreteFlow, values: Tensor, y: Tensor) -> Tensor:
    """Carries values of all x, (K^D,), to their means given each y."""
    powers = flow.num_classes ** torch.arange(flow.length - 1, -1, -1, device=y.device)
    rows = max(1, BLOCK_ENTRIES * flow.num_classes // len(y))
    for transform in flow.transforms:
        if isinstance(transform, PermutationTransform):
            values = values[(transform.inverse(y) * powers).sum(dim=-1)]
        elif not isinstance(transform, ConditionalTransform):
            raise UserError(
                f"the maps of a {type(transform).__name__} cannot be enumerated: give a stack of "
                "conditional transforms and permutations"
            )
        elif not transform.bijection.categorical:
            raise UserError(
                f"{type(transform.bijection).__name__} does not choose its map by a softmax, so "
                "that none can be drawn: give ModularShift or ModularAffine"
            )
        else:
            blocks = y.split(rows)
            if len(blocks) == 1:
                values = _undone(transform, y, values)
            else:
                values = torch.cat(
                    [
                        checkpoint(_undone, transform, block, values, use_reentrant=False)
                        for block in blocks
                    ]
                )
    return values


def _states_of(flow: DiscreteFlow) -> Tensor:
    return states(flow.num_classes, flow.length).to(next(flow.parameters()).device)


def expected_log_likelihood(flow: DiscreteFlow) -> Tensor:
    r"""Computes :math:`\sum_x P(x \mid y) \log q(x)` of every state y.

    Maps are drawn at the temperatures of the transforms' estimators. Its gradient is exact. For one
    in double precision give a flow in double precision.

    Args:
        flow: A flow without context whose states can be enumerated, in thousands.

    Returns:
        Expected log-likelihoods (K^D,), float64, in the order of :func:`dflows.exact.states`.

    Raises:
        UserError: If a map of the flow cannot be drawn, or there are too many states.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from dflows.backbones import MADE
        >>> from dflows import AutoregressiveTransform, FactorizedBase
        >>> from dflows.bijections import ModularAffine
        >>> transform = AutoregressiveTransform(2, ModularAffine(3), MADE(8, 2))
        >>> flow = DiscreteFlow(FactorizedBase(3, 2, [transform.ordering]), [transform])
        >>> expected = expected_log_likelihood(flow)
        >>> expected.shape, bool((expected < mixture_log_likelihood(flow) + 1e-9).all())
        (torch.Size([9]), True)
        >>> round(mixture_log_likelihood(flow).exp().sum().item(), 6)
        1.0
    """
    y = _states_of(flow)
    return _through_all(flow, flow.base.log_prob(y).sum(dim=-1).double(), y)


def mixture_log_likelihood(flow: DiscreteFlow) -> Tensor:
    r"""Computes :math:`\log \sum_x P(x \mid y)\, q(x)` of every state y.

    Argument, result and errors are those of :func:`expected_log_likelihood`.
    """
    y = _states_of(flow)
    return _through_all(flow, flow.base.log_prob(y).sum(dim=-1).double().exp(), y).log()


@dataclass(frozen=True)
class GradientComparison:
    """Creates the comparison of an estimator's gradient with the exact ones.

    All gradients are those of the networks' parameters, the base being as it is.

    Arguments:
        cosine: Cosine of the mean gradient with that of the expected log-likelihood J.
        norm_ratio: Norm of the mean gradient over that of J's.
        mixture_cosine: Cosine with the gradient of the mixture's log-likelihood L.
        mixture_norm_ratio: Norm over that of L's.
        variance: Variance of the gradient of a batch, summed over parameters, over the squared norm
            of J's gradient.
        standard_error: Of the mean gradient, its norm over that of J's gradient; 0 where the
            estimator draws nothing and the mean is exact.
        draws: Draws that the mean was taken over; 1 where it is exact.
        batches: Batches that the variance was taken over.
    """

    cosine: float
    norm_ratio: float
    mixture_cosine: float
    mixture_norm_ratio: float
    variance: float
    standard_error: float
    draws: int
    batches: int

    @property
    def metrics(self) -> dict[str, float]:
        """The values under their names in :data:`dflows.records.METRICS`."""
        return {
            "gradient_cosine": self.cosine,
            "gradient_norm_ratio": self.norm_ratio,
            "gradient_mixture_cosine": self.mixture_cosine,
            "gradient_mixture_norm_ratio": self.mixture_norm_ratio,
            "gradient_variance": self.variance,
            "gradient_standard_error": self.standard_error,
        }


def compare_gradients(
    flow: DiscreteFlow,
    probabilities: Tensor,
    *,
    batch_size: int = 256,
    draws: int = 64,
    batches: int = 64,
    seed: int = 0,
) -> GradientComparison:
    """Compares the gradient of a flow's estimators with the exact ones, in double precision.

    The mean gradient is exact over the data, all states being weighed by their probabilities. Where
    an estimator draws maps or levels, it is the mean over draws of these.

    Args:
        flow: A flow as :func:`expected_log_likelihood` takes it, trained or not; it is left alone.
        probabilities: The probability of every state, (K,) * D.
        batch_size: Examples of a batch whose gradient's variance is asked for.
        draws: Seeded draws that the mean is taken over, where the estimator draws, at least 2.
        batches: Seeded batches that the variance is taken over, at least 2.
        seed: Seed of the draws and batches.

    Returns:
        The comparison.

    Raises:
        UserError: If a map of the flow cannot be drawn, there are too many states, `probabilities`
            is no table of them, or the exact gradient is 0.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from dflows.backbones import MADE
        >>> from dflows import BipartiteTransform, FactorizedBase
        >>> from dflows.bijections import ModularShift
        >>> from dflows.estimators import SoftmaxStraightThrough
        >>> from dflows.orderings import Parity
        >>> probabilities = torch.rand(3, 3, dtype=torch.float64)
        >>> flow = DiscreteFlow(
        ...     FactorizedBase(3, 2, [Parity()]),
        ...     [BipartiteTransform(2, ModularShift(3), MADE(8, 2), SoftmaxStraightThrough(1.0))],
        ... )
        >>> compared = compare_gradients(flow, probabilities / probabilities.sum(), batches=2)
        >>> round(compared.cosine, 6), round(compared.norm_ratio, 6), compared.draws
        (1.0, 1.0, 1)
    """
    weights = check_probabilities(probabilities).flatten()
    flow = copy.deepcopy(flow).double().eval().requires_grad_(True)
    estimators = [transform.estimator.train() for transform in flow.conditional_transforms]
    y = _states_of(flow)
    if len(weights) != len(y):
        raise UserError(
            f"the probabilities are those of {len(weights)} states, and the flow has {len(y)}: "
            f"give a table ({flow.num_classes},) * {flow.length}"
        )
    weights = weights.to(y.device)
    parameters = list(
        {
            parameter: None
            for transform in flow.conditional_transforms
            for parameter in transform.conditioner.parameters()
        }
    )

    def gradient(objective: Tensor) -> Tensor:
        parts = torch.autograd.grad(
            objective, parameters, allow_unused=True, materialize_grads=True
        )
        return torch.cat([part.flatten() for part in parts])

    exact = gradient(weights @ expected_log_likelihood(flow))
    mixture = gradient(weights @ mixture_log_likelihood(flow))
    size = exact.norm()
    if size < ROUND_OFF:
        raise UserError(
            "the exact gradient is 0, so that there is no direction to compare with: give a flow "
            "that can still learn from these probabilities"
        )

    if all(not part.draws_maps and part.draw == "all" for part in estimators):
        draws = 1
    devices = [y.device] if y.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        mean, spread = _moments(lambda: gradient(weights @ flow.objective(y)), draws)

        def of_a_batch() -> Tensor:
            drawn = torch.multinomial(weights, batch_size, replacement=True)
            return gradient(flow.objective(y[drawn]).mean())

        _, variance = _moments(of_a_batch, batches)

    def cosine(other: Tensor) -> float:
        return float(torch.cosine_similarity(mean, other, dim=0))

    return GradientComparison(
        cosine=cosine(exact),
        norm_ratio=float(mean.norm() / size),
        mixture_cosine=cosine(mixture),
        mixture_norm_ratio=float(mean.norm() / mixture.norm()),
        variance=float(variance / size**2),
        standard_error=float((spread / draws).sqrt() / size),
        draws=draws,
        batches=batches,
    )


def _moments(draw: Callable[[], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Computes the mean of drawn vectors, and the sum of the variances of their entries."""
    mean = draw()
    squares = torch.zeros_like(mean[0])
    for number in range(2, count + 1):
        difference = draw() - mean
        mean = mean + difference / number
        squares = squares + difference.square().sum() * (number - 1) / number
    return mean, squares / max(count - 1, 1)


def compare_estimators(
    flow: DiscreteFlow,
    estimators: Mapping[str, Callable[[], Estimator]],
    probabilities: Tensor,
    *,
    batch_size: int = 256,
    draws: int = 64,
    batches: int = 64,
    seed: int = 0,
) -> dict[str, GradientComparison]:
    """Compares the gradients of several estimators at the same parameters of one flow.

    Args:
        flow: As in :func:`compare_gradients`; its own estimators do not matter.
        estimators: How to make each estimator, by a name of one's own.
        probabilities: As in :func:`compare_gradients`, as are the rest.
        batch_size: Examples of a batch.
        draws: Draws of the mean.
        batches: Batches of the variance.
        seed: Seed of the draws and batches, the same for every estimator.

    Returns:
        The comparison of each, by name.

    Raises:
        UserError: As in :func:`compare_gradients`, or if an estimator cannot train a bijection.
    """
    comparisons = {}
    for name, make in estimators.items():
        transforms = list(copy.deepcopy(flow).transforms)
        for transform in transforms:
            if isinstance(transform, ConditionalTransform):
                target = transform.target
                transform.train_by(make())
                if target is not None and transform.target is not None:
                    transform.target = target
        comparisons[name] = compare_gradients(
            DiscreteFlow(flow.base, transforms),
            probabilities,
            batch_size=batch_size,
            draws=draws,
            batches=batches,
            seed=seed,
        )
    return comparisons
