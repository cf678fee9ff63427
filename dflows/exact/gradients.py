"""How far the gradient of each objective is from the exact ones.

These are the gradients of the expected log-likelihood and of the mixture's log-likelihood
(:mod:`dflows.exact.expectations`), for which objectives and the bijections' rules stand.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dflows.errors import UserError
from dflows.exact.expectations import (
    expected_log_likelihood,
    mixture_log_likelihood,
    states_of,
)
from dflows.exact.measures import check_probabilities
from dflows.flow import DiscreteFlow
from dflows.gradients import GradientRule
from dflows.objectives import Objective
from dflows.objectives.local import LocalLosses

__all__ = ["GradientComparison", "compare_gradients", "compare_objectives"]

ROUND_OFF = 1e-12

PROGRESS = 0.0
"""The part of the training that is done where gradients are compared: the first stage's."""


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
        num_samples: Samples that the mean was taken over; 1 where it is exact.
        batches: Batches that the variance was taken over.
    """

    cosine: float
    norm_ratio: float
    mixture_cosine: float
    mixture_norm_ratio: float
    variance: float
    standard_error: float
    num_samples: int
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
    num_samples: int = 64,
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
        num_samples: Seeded samples that the mean is taken over, where there are any, at least 2.
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
        >>> round(compared.cosine, 6), round(compared.norm_ratio, 6), compared.num_samples
        (1.0, 1.0, 1)
    """
    weights = check_probabilities(probabilities).flatten()
    flow, objective = copy.deepcopy(flow), copy.deepcopy(objective)
    objective.prepare(flow)  # targets begin in the precision that they are trained in
    flow.double().eval().requires_grad_(True)
    objective.double().train()
    for rule in _rules(flow):
        rule.train()
    y = states_of(flow)
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
            num_samples = 1
        torch.manual_seed(seed)
        mean, spread = _moments(of_all, num_samples)
        _, variance = _moments(of_a_batch, batches)

    def cosine(other: Tensor) -> float:
        return float(torch.cosine_similarity(mean, other, dim=0))

    return GradientComparison(
        cosine=cosine(exact),
        norm_ratio=float(mean.norm() / size),
        mixture_cosine=cosine(mixture),
        mixture_norm_ratio=float(mean.norm() / mixture.norm()),
        variance=float(variance / size**2),
        standard_error=float((spread / num_samples).sqrt() / size),
        num_samples=num_samples,
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
    num_samples: int = 64,
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
        num_samples: Samples of the mean.
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
            num_samples=num_samples,
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
