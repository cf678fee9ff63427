r"""The exact gradients that objectives stand for, and how far from them each objective is.

Let every transform of a flow sample the map of every dimension from the softmax of its logits, as
:class:`~dflows.gradients.ReinMax` does, so that data y lead to x with a probability
:math:`P(x \mid y)`. End to end, the gradient of a softmax straight-through rule stands for a
softmax of the rule's own temperature, and all others for that of temperature 1. Two functions then
have gradients:

.. math::

    J = \sum_y p(y) \sum_x P(x \mid y) \log q(x), \qquad
    L = \sum_y p(y) \log \sum_x P(x \mid y)\, q(x).

Straight-through rules estimate the gradient of the expected log-likelihood J, the posterior rule
that of the log-likelihood L of the mixture. Where all states can be enumerated both are computed
here without an estimate, and differentiated by autograd: :math:`P` is a product of Markov kernels,
one a transform, and each kernel a product over dimensions of the distributions of :math:`x_d` given
y. Its :math:`K^{2D}` entries are never held.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dflows.bijections import SoftmaxBijection
from dflows.errors import UserError
from dflows.exact.measures import check_probabilities, states
from dflows.flow import DiscreteFlow
from dflows.gradients import GradientRule
from dflows.objectives import Objective
from dflows.objectives.local import LocalLosses
from dflows.representations import to_one_hot
from dflows.transforms import ConditionalTransform, DiscreteTransform

__all__ = [
    "GradientComparison",
    "compare_gradients",
    "compare_objectives",
    "expected_log_likelihood",
    "mixture_log_likelihood",
]

BLOCK_ENTRIES = 2**22
"""Largest number of entries that a kernel is contracted over at once: 32 MB."""

ROUND_OFF = 1e-12

PROGRESS = 0.0
"""The part of the training that is done where gradients are compared: the first stage's."""


def _maps(bijection: SoftmaxBijection) -> tuple[Tensor, Tensor]:
    """Tabulates all maps of a bijection.

    Returns:
        The choices (C, number of choices) that make each map, and the x (C, K) of every y.
    """
    parts = bijection.choice_logits(bijection.initial_logits())
    possible = [part.isfinite().nonzero()[:, 0] for part in parts]
    choices = torch.cartesian_prod(*possible).reshape(-1, len(possible))
    y = torch.arange(bijection.num_classes).expand(len(choices), -1)
    chosen = tuple(choice.unsqueeze(-1).expand(y.shape) for choice in choices.T)
    return choices, bijection.map_by(y, chosen, inverse=True)


def _kernel(bijection: SoftmaxBijection, y: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Computes the distributions (N, d, K) of x, given y (N, d) and logits (N, d, num_logits)."""
    choices, table = _maps(copy.deepcopy(bijection).cpu())
    choices, table = choices.to(y.device), table.to(y.device)
    log_probs = logits.new_zeros((), dtype=torch.float64)
    for part, chosen in zip(bijection.choice_logits(logits), choices.T, strict=True):
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


def _before(
    transform: ConditionalTransform, temperature: float | None, y: Tensor, values: Tensor
) -> Tensor:
    """Computes the means (N,) of values (K^D,) over what y (N, D) is before a transform."""
    bijection = cast("SoftmaxBijection", transform.bijection)
    if temperature is None:
        temperature = bijection.rule.choice_temperature
    kernel = to_one_hot(y, bijection.num_classes, torch.float64)
    dimensions = transform.transformed(y)
    logits = transform.logits(y, dimensions)
    sampled = _kernel(bijection, y[:, dimensions], logits, temperature)
    return _expect(values, kernel.index_copy(1, dimensions, sampled))


def _check_samples(transform: DiscreteTransform) -> None:
    """Refuses a transform whose maps cannot be sampled and enumerated.

    Raises:
        UserError: If they cannot.
    """
    if transform.ordering is None:
        if any(True for _ in transform.parameters()):
            raise UserError(
                f"the maps of a {type(transform).__name__} cannot be enumerated: give a stack of "
                "conditional transforms and permutations"
            )
        return
    bijection = cast("ConditionalTransform", transform).bijection
    if not isinstance(bijection, SoftmaxBijection):
        raise UserError(
            f"{type(bijection).__name__} does not choose its map by a softmax, so that none can "
            "be sampled: give ModularShift or ModularAffine"
        )


def _through_all(
    flow: DiscreteFlow, values: Tensor, y: Tensor, temperature: float | None
) -> Tensor:
    """Carries values of all x, (K^D,), to their means given each y."""
    powers = flow.num_classes ** torch.arange(flow.length - 1, -1, -1, device=y.device)
    rows = max(1, BLOCK_ENTRIES * flow.num_classes // len(y))
    for transform in flow.transforms:
        _check_samples(transform)
        if transform.ordering is None:
            values = values[(transform.inverse(y) * powers).sum(dim=-1)]
            continue
        before = partial(_before, cast("ConditionalTransform", transform), temperature)
        blocks = y.split(rows)
        if len(blocks) == 1:
            values = before(y, values)
        else:
            parts = [checkpoint(before, block, values, use_reentrant=False) for block in blocks]
            values = torch.cat(parts)
    return values


def _states_of(flow: DiscreteFlow) -> Tensor:
    return states(flow.num_classes, flow.length).to(next(flow.parameters()).device)


def expected_log_likelihood(flow: DiscreteFlow, temperature: float | None = None) -> Tensor:
    r"""Computes :math:`\sum_x P(x \mid y) \log q(x)` of every state y.

    Its gradient is exact. For one in double precision give a flow in double precision.

    Args:
        flow: A flow without context whose states can be enumerated, in thousands.
        temperature: That of the softmax that maps are sampled from; by default, for each bijection,
            the one that the gradient of its rule stands for.

    Returns:
        Expected log-likelihoods (K^D,), float64, in the order of :func:`dflows.exact.states`.

    Raises:
        UserError: If a map of the flow cannot be sampled, or there are too many states.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from dflows import flows
        >>> from dflows.bijections import ModularAffine
        >>> flow = flows.bipartite(3, 2, bijection=ModularAffine)
        >>> expected = expected_log_likelihood(flow)
        >>> expected.shape, bool((expected < mixture_log_likelihood(flow) + 1e-9).all())
        (torch.Size([9]), True)
        >>> round(mixture_log_likelihood(flow).exp().sum().item(), 6)
        1.0
    """
    y = _states_of(flow)
    return _through_all(flow, flow.base.log_prob(y).sum(dim=-1).double(), y, temperature)


def mixture_log_likelihood(flow: DiscreteFlow, temperature: float | None = None) -> Tensor:
    r"""Computes :math:`\log \sum_x P(x \mid y)\, q(x)` of every state y.

    Arguments, result and errors are those of :func:`expected_log_likelihood`.
    """
    y = _states_of(flow)
    probs = flow.base.log_prob(y).sum(dim=-1).double().exp()
    return _through_all(flow, probs, y, temperature).log()


@dataclass(frozen=True)
class GradientComparison:
    """Creates the comparison of an objective's gradient with the exact ones.

    All gradients are those of the networks' parameters, the base being as it is.

    Args:
        cosine: Cosine of the mean gradient with that of the expected log-likelihood J.
        norm_ratio: Norm of the mean gradient over that of J's.
        mixture_cosine: Cosine with the gradient of the mixture's log-likelihood L.
        mixture_norm_ratio: Norm over that of L's.
        variance: Variance of the gradient of a batch, summed over parameters, over the squared norm
            of J's gradient.
        standard_error: Of the mean gradient, its norm over that of J's gradient; 0 where nothing is
            sampled and the mean is exact.
        draws: Samples that the mean was taken over; 1 where it is exact.
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
    objective: Objective,
    probabilities: Tensor,
    *,
    batch_size: int = 256,
    draws: int = 64,
    batches: int = 64,
    seed: int = 0,
) -> GradientComparison:
    """Compares the gradient of an objective with the exact ones, in double precision.

    The mean gradient is exact over the data, all states being weighed by their probabilities. Where
    maps, levels or transforms are sampled, it is the mean over samples of these. An objective of
    several stages is compared in the first.

    Args:
        flow: A flow as :func:`expected_log_likelihood` takes it, trained or not; it is left alone.
        objective: The objective, trained or not; it is left alone as well.
        probabilities: The probability of every state, (K,) * D.
        batch_size: Examples of a batch whose gradient's variance is asked for.
        draws: Seeded samples that the mean is taken over, where there are any, at least 2.
        batches: Seeded batches that the variance is taken over, at least 2.
        seed: Seed of the samples and batches.

    Returns:
        The comparison.

    Raises:
        UserError: If a map of the flow cannot be sampled, the objective cannot train the flow,
            there are too many states, `probabilities` is no table of them, or the exact gradient is
            0.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from dflows import flows
        >>> from dflows.bijections import ModularShift
        >>> from dflows.objectives import EndToEnd
        >>> probabilities = torch.rand(3, 3, dtype=torch.float64)
        >>> probabilities = probabilities / probabilities.sum()
        >>> flow = flows.bipartite(3, 2, num_transforms=1, bijection=ModularShift)
        >>> compared = compare_gradients(flow, EndToEnd(), probabilities, batches=2)
        >>> round(compared.cosine, 6), round(compared.norm_ratio, 6), compared.draws
        (1.0, 1.0, 1)
    """
    weights = check_probabilities(probabilities).flatten()
    flow, objective = copy.deepcopy(flow), copy.deepcopy(objective)
    objective.prepare(flow)  # targets begin in the precision that they are trained in
    flow.double().eval().requires_grad_(True)
    objective.double().train()
    for rule in _rules(flow):
        rule.train()
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

    def gradient(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    temperature = None if objective.end_to_end(PROGRESS) else 1.0
    exact = gradient(weights @ expected_log_likelihood(flow, temperature))
    mixture = gradient(weights @ mixture_log_likelihood(flow, temperature))
    size = exact.norm()
    if size < ROUND_OFF:
        raise UserError(
            "the exact gradient is 0, so that there is no direction to compare with: give a flow "
            "that can still learn from these probabilities"
        )

    def of_all() -> Tensor:
        return gradient(weights @ objective(flow, y, progress=PROGRESS))

    def of_a_batch() -> Tensor:
        some = torch.multinomial(weights, batch_size, replacement=True)
        return gradient(objective(flow, y[some], progress=PROGRESS).mean())

    with torch.random.fork_rng([y.device] if y.device.type == "cuda" else []):
        if not _draws(of_all, y.device):
            draws = 1
        torch.manual_seed(seed)
        mean, spread = _moments(of_all, draws)
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


def _rules(flow: DiscreteFlow) -> list[GradientRule]:
    rules = [transform.bijection.rule for transform in flow.conditional_transforms]
    return [rule for rule in rules if rule is not None]


def _draws(function: Callable[[], Tensor], device: torch.device) -> bool:
    """Says whether a function takes random numbers."""

    def state() -> Tensor:
        if device.type == "cuda":
            return torch.cuda.get_rng_state(device)
        return torch.random.get_rng_state()

    before = state()
    function()
    return not torch.equal(before, state())


def _moments(sample: Callable[[], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Computes the mean of sampled vectors, and the sum of the variances of their entries."""
    mean = sample()
    squares = torch.zeros_like(mean[0])
    for number in range(2, count + 1):
        difference = sample() - mean
        mean = mean + difference / number
        squares = squares + difference.square().sum() * (number - 1) / number
    return mean, squares / max(count - 1, 1)


def compare_objectives(
    flow: DiscreteFlow,
    objectives: Mapping[str, tuple[GradientRule | None, Objective]],
    probabilities: Tensor,
    *,
    trained: Objective | None = None,
    batch_size: int = 256,
    draws: int = 64,
    batches: int = 64,
    seed: int = 0,
) -> dict[str, GradientComparison]:
    """Compares the gradients of several rules and objectives at the same parameters of one flow.

    Args:
        flow: As in :func:`compare_gradients`.
        objectives: By a name of one's own, the rule by which the choices of all bijections are
            differentiated, none to leave their own, and the objective.
        probabilities: As in :func:`compare_gradients`, as are the rest.
        trained: The objective that trained the flow. Where it has distributions of x that the
            transforms aim at and another has them too, the other takes them over.
        batch_size: Examples of a batch.
        draws: Samples of the mean.
        batches: Batches of the variance.
        seed: Seed of the samples and batches, the same for every objective.

    Returns:
        The comparison of each, by name.

    Raises:
        UserError: As in :func:`compare_gradients`.
    """
    comparisons = {}
    for name, (rule, objective) in objectives.items():
        ruled, objective = copy.deepcopy(flow), copy.deepcopy(objective)
        if rule is not None:
            for transform in ruled.conditional_transforms:
                if transform.bijection.rule is not None:
                    transform.bijection.rule = copy.deepcopy(rule)
        objective.prepare(ruled)
        if trained is not None:
            _take_targets(objective, trained)
        comparisons[name] = compare_gradients(
            ruled,
            objective,
            probabilities,
            batch_size=batch_size,
            draws=draws,
            batches=batches,
            seed=seed,
        )
    return comparisons


@torch.no_grad()
def _take_targets(objective: Objective, trained: Objective) -> None:
    """Copies the targets of a trained objective where both have them."""
    found = {key: value for part in _aiming(trained) for key, value in part.targets.items()}
    for part in _aiming(objective):
        for key in part.targets.keys() & found.keys():
            part.targets[key].copy_(found[key])


def _aiming(objective: Objective) -> list[LocalLosses]:
    return [part for part in objective.modules() if isinstance(part, LocalLosses)]
