"""The discrete flow: a base and transforms.

``transform(x)`` maps base → data, everywhere in dflows; a stack lists its transforms in that order.
A bijection of a finite set changes no volume, so p(y) = p_base(x) with x = f⁻¹(y): the likelihood
is exact, and there is no Jacobian.

A flow knows nothing of training. `-flow.log_prob(y).mean()` has the gradient of the bijections'
rules (:mod:`dflows.gradients`); other objectives are in :mod:`dflows.objectives`.
"""

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution, constraints

from dflows.acceleration import Acceleration
from dflows.arguments import check_event
from dflows.bases import Base
from dflows.classes import Classes
from dflows.errors import UserError
from dflows.generation import Method, check_draft, check_sampling, expand_prompt, generate
from dflows.gradients import example_weights
from dflows.modules import device_of
from dflows.orderings import Ordering, untransformed
from dflows.representations import (
    check_indices,
    exactly,
    flatten_batch,
    repeat_context,
    to_one_hot,
)
from dflows.transforms import ConditionalTransform, DiscreteTransform
from dflows.views import view

__all__ = ["DiscreteFlow", "FlowDistribution"]


class DiscreteFlow(nn.Module):
    r"""Creates a discrete flow, :math:`p(y) = p_\mathrm{base}(f^{-1}(y))`.

    Called with an optional context it is a `torch.distributions.Distribution`.

    Args:
        base: The distribution of x, which adapts to the orderings of the transforms.
        transforms: Transforms in the order base → data; compositions are flattened.
        context_encoder: Maps contexts to vectors (B, C) or sequences (B, S, C); without it,
            contexts must already have one of these shapes.

    Attributes:
        evaluations: Sequential network evaluations of the last samples, by base and transforms.

    Raises:
        UserError: If the parts do not fit each other.

    References:
        | Discrete Flows: Invertible Generative Models of Discrete Data (Tran et al., 2019)
        | https://arxiv.org/abs/1905.10347

    Example:
        >>> from dflows import flows
        >>> flow = flows.bipartite(num_classes=3, length=4)
        >>> flow.log_prob(torch.zeros(2, 4, dtype=torch.long)).shape, flow.passes
        (torch.Size([2]), 2)
    """

    def __init__(
        self,
        base: Base,
        transforms: Sequence[DiscreteTransform] = (),
        context_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        stack = nn.ModuleList(part for transform in transforms for part in transform.parts)
        self.transforms = cast("Sequence[DiscreteTransform]", stack)
        self.context_encoder = context_encoder
        for transform in self.conditional_transforms:
            if transform.length != base.length:
                raise UserError(
                    f"a transform of {transform.length} dimensions does not fit a base of "
                    f"{base.length}: give both the same length"
                )
            if not transform.keeps(base.classes):
                raise UserError(
                    f"a bijection of {transform.conditioner.classes} classes does not fit a base "
                    f"of {base.classes}: give both the same num_classes"
                )
        for other in self.transforms:
            if not other.keeps(base.classes):
                name = type(other).__name__
                raise UserError(f"a {name} makes values of classes that their dimensions have not")
        base.adapt(self._orderings)
        self.evaluations: list[int] = []
        self._acceleration = Acceleration()

    @property
    def num_classes(self) -> int:
        """K, or the largest number."""
        return self.base.num_classes

    @property
    def classes(self) -> Classes:
        """The classes of every dimension."""
        return self.base.classes

    @property
    def length(self) -> int:
        """D."""
        return self.base.length

    @property
    def conditional_transforms(self) -> list[ConditionalTransform]:
        """The transforms of the stack that are conditional over an ordering, base → data."""
        found = (one for one in self.transforms if one.ordering is not None)
        return cast("list[ConditionalTransform]", [*found])

    @property
    def _orderings(self) -> list[Ordering]:
        return [one.ordering for one in self.conditional_transforms]

    @property
    def passes(self) -> int:
        """Sequential network evaluations for one batch of samples."""
        return self.base.passes + sum(transform.passes for transform in self.transforms)

    def with_passes(self, passes: int) -> "DiscreteFlow":
        """Returns this flow with another number of passes; both share all parameters.

        Raises:
            UserError: If it has transforms, or its base cannot have so many.
        """
        own = _own_acceleration(self, f"{passes} passes were")
        return view(self, base=self.base.with_passes(passes), _acceleration=own)

    def with_length(self, length: int) -> "DiscreteFlow":
        """Returns this flow over events of another length; both share all parameters.

        Raises:
            UserError: If it has transforms, or its base has parameters for each dimension.
        """
        own = _own_acceleration(self, f"{length} dimensions were")
        return view(self, base=self.base.with_length(length), _acceleration=own)

    def with_ordering(self, ordering: Ordering) -> "DiscreteFlow":
        """Returns this flow over another ordering; both share all parameters.

        Raises:
            UserError: If it has transforms, or its base serves one ordering alone.
        """
        own = _own_acceleration(self, "another ordering was")
        return view(self, base=self.base.with_ordering(ordering), _acceleration=own)

    @property
    def untransformed(self) -> int:
        """Number of dimensions that no transform ever changes, at most."""
        return len(untransformed(self._orderings, self.length))

    @property
    def transforms_learn(self) -> bool:
        """Whether some transform has parameters, which learn from the gradients of values."""
        return any(True for _ in self.transforms.parameters())  # type: ignore[attr-defined]

    @property
    def takes_context(self) -> bool:
        """Whether some part depends on a context."""
        return self.base.takes_context or any(part.takes_context for part in self.transforms)

    def encode_context(self, context: Tensor | None) -> Tensor | None:
        """Encodes a context into vectors (B, C) or sequences (B, S, C).

        Raises:
            UserError: If no part of the flow takes one.
        """
        if context is not None and not self.takes_context:
            raise UserError(
                "a context was given to a flow that takes none: give its conditioners a "
                "Context, or give no context"
            )
        if context is not None and self.context_encoder is not None:
            with exactly(context.device):
                context = cast("Tensor", self.context_encoder(context))
        return context

    def forward(self, context: Tensor | None = None) -> "FlowDistribution":
        """Returns the distribution of y, given a context (B, …) or none."""
        return FlowDistribution(self, self.encode_context(context))

    def check_indices(self, y: Tensor, *, wait: bool = False) -> Tensor:
        """Returns indices (…, d) as 64-bit integers: :func:`~dflows.representations.check_indices`.

        Raises:
            UserError: If they are no indices of the flow's classes, or have too many dimensions.
        """
        return check_indices(y, self.classes, wait=wait)

    def log_prob(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Computes the exact log-probability, in nats.

        Its gradient is that of the bijections' rules. In training mode with gradients a stochastic
        rule samples maps, as dropout does: the value is the log-probability under these maps.

        Args:
            y: Indices (…, d); d < D is a shorter event.
            context: What the flow is conditioned on, (B, …) with B the last batch dimension of y.

        Returns:
            Log-probabilities (…).

        Raises:
            UserError: If `y` holds no indices, or more dimensions than the flow.
        """
        return self._log_prob(self.check_indices(y), self.encode_context(context))

    @torch.no_grad()
    def log_prob_terms(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Computes the log-probability of every dimension, in nats; their sum is :meth:`log_prob`.

        Without transforms, a term is the log-probability of y_d given the dimensions of lower
        levels. With them it is that of x_d, the value that they leave at its place.

        Args:
            y: Indices (…, d).
            context: As in :meth:`log_prob`.

        Returns:
            Log-probabilities (…, d).
        """
        flat, context, shape = flatten_batch(self.check_indices(y), self.encode_context(context))
        with exactly(y.device):
            terms = self.base.log_prob(self.inverse(flat, context), context)
        return terms.reshape(shape + terms.shape[1:])

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        y, context, shape = flatten_batch(y, context)
        with exactly(y.device), example_weights() as weights:
            x = self.inverse(self.differentiable(y), context)
            log_prob = self.base.log_prob(x, context).sum(dim=-1)
        return weights(log_prob).reshape(shape)

    def differentiable(self, y: Tensor) -> Tensor:
        """Returns indices as one-hot vectors where a transform learns from their gradient."""
        if not (torch.is_grad_enabled() and self.transforms_learn):
            return y
        dtypes = (part.dtype for part in self.parameters() if part.is_floating_point())
        dtype = torch.promote_types(next(dtypes, torch.float), torch.float)
        return to_one_hot(y, self.num_classes, dtype)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps data → base.

        Args:
            y: Indices (…, d) or one-hot vectors (…, d, K).
            context: An encoded context.

        Returns:
            x, in the representation of `y`.
        """
        for transform in reversed(self.transforms):
            y = transform.inverse(y, context)
        return y

    @torch.no_grad()
    def residuals(self, y: Tensor, context: Tensor | None = None) -> list[Tensor]:
        """Returns y after the inverse of each transform, the data's side first.

        Args:
            y: Indices (…, d).
            context: As in :meth:`log_prob`.

        Returns:
            Indices (…, d), one tensor a transform; the last is x.
        """
        flat, context, shape = flatten_batch(self.check_indices(y), self.encode_context(context))
        values = []
        with exactly(y.device):
            for transform in reversed(self.transforms):
                flat = transform.inverse(flat, context)
                values.append(flat.reshape(shape + flat.shape[1:]))
        return values

    @torch.no_grad()
    def sample(
        self,
        sample_shape: Sequence[int] = (),
        context: Tensor | None = None,
        *,
        length: int | None = None,
        temperature: float = 1.0,
        generator: Generator | None = None,
        method: Method = "levels",
        prompt: Tensor | None = None,
        draft: Base | None = None,
    ) -> Tensor:
        """Draws exact samples.

        Args:
            sample_shape: Shape S of the samples.
            context: What the flow is conditioned on, (B, …).
            length: Dimensions d of an event; D by default.
            temperature: Divides the base's logits; 1 samples the flow itself.
            generator: Source of randomness.
            method: ``levels``, one evaluation a level, or ``fixed_point``, iterations over all
                dimensions until nothing changes. The samples are the same.
            prompt: Prefix of the samples, indices (n,), or one a sample; the rest has its exact
                distribution given it. It must not depend on later dimensions, as over Natural.
            draft: An :class:`~dflows.bases.NGramBase`, whose guesses from the same noise make the
                iterations of the base fewer.

        Returns:
            Indices ``(*S, d)``, or ``(*S, B, d)`` with a context.

        Raises:
            UserError: If an option cannot be honoured.
        """
        check_sampling(temperature, method, self._acceleration)
        check_draft(draft, self.base, method)
        return self._sample(
            torch.Size(sample_shape),
            self.encode_context(context),
            check_event(length, self.length),
            generator,
            prompt,
            temperature=temperature,
            fixed_point=method == "fixed_point",
            draft=draft,
        )

    def _sample(
        self,
        shape: torch.Size,
        context: Tensor | None,
        length: int,
        generator: Generator | None = None,
        prompt: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if context is not None:
            shape = shape + context.shape[:1]
            context = repeat_context(context, shape.numel() // max(context.shape[0], 1))
        noise = self.base.noise(shape.numel(), length, generator)
        if prompt is not None:
            parts: list[Base | DiscreteTransform] = [self.base, *self.transforms]
            prompt = expand_prompt(prompt.to(noise.device), shape, length, parts)
            prompt = self.check_indices(prompt, wait=True)
        with exactly(noise.device):
            value, self.evaluations = self._acceleration(
                partial(generate, self.base, self.transforms),
                self,
                (noise, context, prompt),
                **options,
            )
        return value.reshape(*shape, length)

    def accelerate(self, *, compile: bool = False, cuda_graph: bool = False) -> None:  # noqa: A002
        """Sets how samples are computed; those of a seed stay the same to round-off.

        Args:
            compile: Whether to compile the parts that run level by level (``torch.compile``).
            cuda_graph: Whether to capture all levels as one CUDA graph and replay it. It needs a
                CUDA device, and excludes the fixed point, which depends on values.
        """
        self._acceleration = Acceleration(compile=compile, cuda_graph=cuda_graph)

    @torch.no_grad()
    def greedy(self, context: Tensor | None = None, *, length: int | None = None) -> Tensor:
        """Decodes greedily: takes the base's likeliest value after those before it, mapped to data.

        Where the dimensions of the base are independent this is the flow's mode
        (:attr:`FlowDistribution.mode`), since a bijection changes no probability.

        Args:
            context: What the flow is conditioned on, (B, …).
            length: Dimensions d of an event, 1 to D; D by default.

        Returns:
            Indices (d,), or (B, d) with a context.
        """
        return self._greedy(self.encode_context(context), check_event(length, self.length))

    def _greedy(self, context: Tensor | None, length: int) -> Tensor:
        number = 1 if context is None else context.shape[0]
        with exactly(device_of(self)):
            value = self.base.greedy(number, length, context)
            for transform in self.transforms:
                value = transform(value, context)
        return value.squeeze(0) if context is None else value


def _own_acceleration(flow: DiscreteFlow, what: str) -> Acceleration:
    """Returns a flow's acceleration for a view of it, without its graphs, which are of one size."""
    if len(flow.transforms):
        raise UserError(
            f"{what} asked for, and a base is fitted to the levels and dimensions of its "
            "transforms: train a flow without transforms, dflows.flows.language_model say"
        )
    return copy(flow._acceleration)


class FlowDistribution(Distribution):
    """Creates the distribution of y under a flow, given a context.

    Its batch shape is that of the context, its event shape (D,).

    Args:
        flow: The flow.
        context: Encoded context (B, C) or (B, S, C), or None.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, flow: DiscreteFlow, context: Tensor | None = None) -> None:
        self.flow = flow
        self.context = context
        batch = torch.Size() if context is None else context.shape[:1]
        super().__init__(batch, torch.Size([flow.length]), validate_args=False)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_classes={self.flow.num_classes}, "
            f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"
        )

    @property
    def support(self) -> constraints.Constraint:
        """Events of D integers, each from 0 to below the number of classes of its dimension."""
        classes = self.flow.classes
        most = classes.largest if classes.each is None else classes.numbers
        return constraints.independent(constraints.integer_interval(0, most - 1), 1)

    @property
    def mode(self) -> Tensor:
        """The most likely event, indices ``(*batch_shape, D)``.

        Raises:
            UserError: If the dimensions of the base are not independent: the mode would take a
                search.
        """
        base = self.flow.base
        if not base.greedy_is_mode:
            raise UserError(
                f"the mode of a flow on {type(base).__name__} takes a search over all events: "
                "use flow.greedy(context), which is the mode on a FactorizedBase"
            )
        with torch.no_grad():
            return self.flow._greedy(self.context, self.flow.length)

    def log_prob(self, value: Tensor) -> Tensor:
        """Computes the exact log-probability of indices (…, d), in nats.

        Raises:
            UserError: If `value` lies outside the support.
        """
        value = self.flow.check_indices(value, wait=True)
        context = self.context
        if context is not None and value.ndim == 1:
            value = value.expand(*self.batch_shape, -1)
        return self.flow._log_prob(value, context)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws exact samples, indices ``(*sample_shape, *batch_shape, D)``."""
        return self.flow._sample(torch.Size(sample_shape), self.context, self.flow.length)
