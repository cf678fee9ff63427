"""The discrete flow: a base and transforms.

``transform(x)`` maps base → data, everywhere in dflows; a stack lists its transforms in that order.
Since a bijection of a finite set changes no volume, p(y) = p_base(x) with x the value that y comes
from: the likelihood is exact, and there is no Jacobian.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution, constraints

from dflows.acceleration import Acceleration
from dflows.bases import Base
from dflows.conditioner import Conditioner
from dflows.errors import UserError
from dflows.estimators import Draw, Estimator, LocalThenJoint
from dflows.orderings import untransformed
from dflows.representations import flatten_batch, is_one_hot, repeat_context, to_one_hot
from dflows.transforms import Composition, ConditionalTransform, DiscreteTransform, Inverse
from dflows.transforms.composition import beginnings

__all__ = ["DiscreteFlow", "FlowDistribution", "Method"]

Method = Literal["levels", "fixed_point"]


def _taken_apart(transforms: Iterable[DiscreteTransform]) -> Iterator[DiscreteTransform]:
    for transform in transforms:
        if isinstance(transform, Composition):
            yield from _taken_apart(transform.transforms)
        else:
            yield transform


def _estimators(module: nn.Module) -> Iterator[Estimator]:
    """Returns the estimators in a module, not those that another estimator is made of."""
    for part in module.children():
        if isinstance(part, Estimator):
            yield part
        else:
            yield from _estimators(part)


def _add_at(total: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    dtype = torch.promote_types(total.dtype, value.dtype)
    return total.to(dtype).index_add(0, rows, value.to(dtype))


def _idle(module: nn.Module) -> Tensor | float:
    """Returns a zero that hangs on all parameters, since distributed training awaits them all."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return sum((0 * parameter.sum() for parameter in parameters), start=0.0)


class DiscreteFlow(nn.Module):
    r"""Creates a discrete flow, :math:`p(y) = p_\mathrm{base}(f^{-1}(y))`.

    Called with an optional context it is a `torch.distributions.Distribution`.

    Arguments:
        base: The distribution of x.
        transforms: Transforms in the order base → data; compositions are taken apart.
        context_encoder: Maps what the user conditions on to vectors (B, C) or sequences (B, S, C);
            without it the context must have one of these shapes.

    Attributes:
        evaluations: Network evaluations, one after the other, that the last samples took: of the
            base, and of every transform.

    Raises:
        UserError: If the parts do not fit each other.

    References:
        | Discrete Flows: Invertible Generative Models of Discrete Data (Tran et al., 2019)
        | https://arxiv.org/abs/1905.10347

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from dflows.backbones import DilatedConvolution
        >>> from dflows.bases import FactorizedBase
        >>> from dflows.bijections import RankPermutation
        >>> from dflows.orderings import Parity
        >>> from dflows.transforms import BipartiteTransform
        >>> orderings = [Parity(), Parity(first=1)]
        >>> flow = DiscreteFlow(
        ...     FactorizedBase(num_classes=3, length=4, orderings=orderings),
        ...     [
        ...         BipartiteTransform(
        ...             4, RankPermutation(3), DilatedConvolution(width=8), ordering=ordering
        ...         )
        ...         for ordering in orderings
        ...     ],
        ... )
        >>> states = torch.cartesian_prod(*[torch.arange(3)] * 4)
        >>> round(flow().log_prob(states).exp().sum().item(), 5)
        1.0
        >>> flow().sample((2,)).shape, flow.passes
        (torch.Size([2, 4]), 2)
    """

    def __init__(
        self,
        base: Base,
        transforms: Sequence[DiscreteTransform] = (),
        context_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        stack = nn.ModuleList(_taken_apart(transforms))
        self.transforms = cast("Sequence[DiscreteTransform]", stack)
        self.context_encoder = context_encoder
        conditional = self.conditional_transforms
        for transform in conditional:
            if transform.length != base.length:
                raise UserError(
                    f"a transform of {transform.length} dimensions stands on a base of "
                    f"{base.length}: give both the same length"
                )
            if transform.bijection.num_classes != base.num_classes:
                raise UserError(
                    f"a bijection of {transform.bijection.num_classes} classes stands on a base of "
                    f"{base.num_classes}: give both the same num_classes"
                )
        draws = {transform.estimator.draw for transform in conditional}
        if len(draws) > 1 and not draws.isdisjoint(("flow", "turn")):
            raise UserError(
                "some flows of the stack are trained one at a time and others are not: give every "
                "flow an estimator with draw='flow', or every one LocalInTurn, or none"
            )
        if not base.differentiable and any(
            part.estimator.through or isinstance(part.estimator, LocalThenJoint)
            for part in conditional
        ):
            raise UserError(
                f"the base has to hand a gradient to the flows, and a {type(base).__name__} has "
                "none: give every flow LocalObjective, whose loss is its own, or another base"
            )
        ways = {
            f"{type(part.estimator).__name__}({part.estimator.extra_repr()})"
            for part in conditional
        }
        if draws == {"turn"} and len(ways) > 1:
            raise UserError(
                f"flows take turns as {' and as '.join(sorted(ways))}: give every flow the same"
            )
        backbones = {id(transform.conditioner.backbone) for transform in conditional}
        if draws == {"turn"} and len(backbones) < len(conditional):
            raise UserError(
                "flows that are trained in turn share a backbone, so that each would undo what the "
                "one before it has learnt: give every flow its own, or LocalObjective"
            )
        self._estimators = list(_estimators(stack))
        self.evaluations: list[int] = []
        self._acceleration = Acceleration()
        for part in stack:
            if isinstance(part, Inverse) and any(
                not estimator.through for estimator in _estimators(part)
            ):
                raise UserError(
                    "an inverse stands in the stack, and its estimator trains from data to base "
                    "only: give SoftmaxStraightThrough or PosteriorRule to what is inverted"
                )

    def at_step(self, step: int, progress: float | None = None) -> None:
        """Tells the estimators how many optimizer steps were done.

        Those that change with the training need it before each, in a training loop of one's own;
        :class:`lightning_modules.DiscreteFlowModule` does it.

        Args:
            step: The number of steps.
            progress: The part of the training that is done, 0 to 1, where it is known.
        """
        for estimator in self._estimators:
            estimator.at_step(step)
            if progress is not None:
                estimator.at_progress(progress, len(self.conditional_transforms))

    @property
    def _through(self) -> bool:
        return any(estimator.through for estimator in self._estimators)

    def _draws(self, what: Draw) -> bool:
        draws = [transform.estimator.draw for transform in self.conditional_transforms]
        return len(draws) > 1 and set(draws) == {what}

    @property
    def _turn(self) -> int:
        """Number of the turn, in rounds of all flows, the data's side first."""
        flows = self.conditional_transforms
        turn = flows[0].estimator.turn
        if turn is None:
            raise UserError(
                "flows share the training in turn, and how much of it is done is not known: call "
                "at_step(step, progress) before each step, or give LocalInTurn the steps of a turn"
            )
        return min(turn, self.turns - 1)

    @property
    def turns(self) -> int:
        """The turns that flows have in all, where they are trained in turn."""
        flows = self.conditional_transforms
        return flows[0].estimator.rounds * len(flows) if flows else 0

    @property
    def waiting(self) -> list[ConditionalTransform]:
        """The transforms that do not learn, where flows are trained in turn.

        Their gradients are zeros, which distributed training needs and an optimizer with a memory
        would still step by; :class:`lightning_modules.DiscreteFlowModule` takes them away before
        each step.
        """
        if not self._draws("turn"):
            return []
        flows = self.conditional_transforms[::-1]
        learns = self._turn % len(flows)
        return [flow for number, flow in enumerate(flows) if number != learns]

    @property
    def _draws_maps(self) -> bool:
        return any(estimator.draws_maps and estimator.training for estimator in self._estimators)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.base.num_classes

    @property
    def length(self) -> int:
        """D."""
        return self.base.length

    @property
    def conditional_transforms(self) -> list[ConditionalTransform]:
        """The transforms of the stack that hold a network, base → data."""
        return [
            transform
            for transform in self.transforms
            if isinstance(transform, ConditionalTransform)
        ]

    @property
    def passes(self) -> int:
        """Network evaluations, one after the other, that one batch of samples takes."""
        return self.base.passes + sum(transform.passes for transform in self.transforms)

    @property
    def untransformed(self) -> int:
        """Number of dimensions that no transform ever changes.

        Permutations between transforms are not looked through: it is exact for stacks of
        conditional transforms, and an upper bound elsewhere.
        """
        orderings = [transform.ordering for transform in self.conditional_transforms]
        return len(untransformed(orderings, self.length))

    def encode_context(self, context: Tensor | None) -> Tensor | None:
        """Encodes a context into vectors (B, C) or sequences (B, S, C).

        Raises:
            UserError: If no part of the flow takes one.
        """
        parts: list[Base | DiscreteTransform] = [self.base, *self.transforms]
        if context is not None and not any(part.takes_context for part in parts):
            raise UserError(
                "a context was given to a flow that takes none: set `context_features` of its "
                "transforms or of an AutoregressiveBase, or give no context"
            )
        if context is None or self.context_encoder is None:
            return context
        encoded: Tensor = self.context_encoder(context)
        return encoded

    def forward(self, context: Tensor | None = None) -> "FlowDistribution":
        """Returns the distribution of y, given a context (B, …) or none."""
        return FlowDistribution(self, self.encode_context(context))

    def _check(self, y: Tensor, wait: bool = False) -> Tensor:
        """Returns indices as 64-bit integers.

        Values are looked at where that takes no wait for a device, or else if asked to.
        """
        if y.is_floating_point() or y.dtype == torch.bool:
            raise UserError(
                f"values of dtype {y.dtype} were given: give indices 0..{self.num_classes - 1} as "
                "integers"
            )
        if not 1 <= y.shape[-1] <= self.length:
            raise UserError(
                f"an event of {y.shape[-1]} dimensions was given, and the flow has {self.length}: "
                "give 1 to that many"
            )
        if wait or (y.device.type == "cpu" and not torch.compiler.is_compiling()):
            outside = (y < 0) | (y >= self.num_classes)
            if outside.any():
                raise UserError(
                    f"a value of {int(y[outside][0])} lies outside 0..{self.num_classes - 1}"
                )
        return y.long()

    def log_prob(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Computes the exact log-probability, in nats.

        Its gradient is that of the transforms' estimators.

        Args:
            y: Indices (…, d); d below D is an event of its own.
            context: What the flow is conditioned on, (B, …) with B the last batch dimension of y.

        Returns:
            Log-probabilities (…).

        Raises:
            UserError: If `y` holds no indices, or more dimensions than the flow.
        """
        return self._log_prob(self._check(y), self.encode_context(context))

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        if self._draws_maps and torch.is_grad_enabled():
            with torch.no_grad():
                exact = self._log_prob(y, context)
            estimate = self._objective(y, context)
            return exact + (estimate - estimate.detach())
        flat, context, shape = flatten_batch(y, context)
        x, total = self._inverse(flat, context)
        return (self.base.log_prob(x, context).sum(dim=-1) + total).reshape(shape)

    def _inverse(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._through and torch.is_grad_enabled():
            y = to_one_hot(y, self.num_classes)
        total = torch.zeros(y.shape[0], device=y.device)
        for transform in reversed(self.transforms):
            y, ladj = transform.inverse_and_ladj(y, context)
            total = total + ladj
        return y, total

    def objective(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Computes what training maximises: the log-probability, or an unbiased estimate of it.

        Where an estimator draws levels or flows, only these are evaluated. In value the mean over
        draws is :meth:`log_prob`; the gradient is the estimators'. Where one draws maps
        (:class:`~dflows.estimators.GumbelStraightThrough`, :class:`~dflows.estimators.ReinMax`),
        the value in training mode, with gradients, is the log-probability under the maps that were
        drawn, whose mean is not that under the chosen ones.

        In training mode n-grams do not count what they were counted on: y is taken for a part of
        that text, and its own occurrences are left out. So the value is then no log-probability.

        Arguments, result and errors are those of :meth:`log_prob`.
        """
        with self.without_own():
            return self._objective(self._check(y), self.encode_context(context))

    @contextmanager
    def without_own(self, counted: bool | None = None) -> Iterator[None]:
        """Takes what is scored for a part of what n-grams were counted on.

        Its own occurrences are left out of the counts, as in :meth:`objective`.

        Args:
            counted: Whether it is such a part; by default it is in training mode.
        """
        conditioners = [part for part in self.modules() if isinstance(part, Conditioner)]
        known = [part for part in conditioners if part.grams is not None]
        try:
            for part in known:
                part.without_own = part.training if counted is None else counted
            yield
        finally:
            for part in known:
                part.without_own = False

    def _objective(self, y: Tensor, context: Tensor | None) -> Tensor:
        flat, context, shape = flatten_batch(y, context)
        if self._draws("flow"):
            return self._drawn_flow(flat, context).reshape(shape)
        if self._draws("turn"):
            return self._flow_in_turn(flat, context).reshape(shape)
        x, total, weight = flat, torch.zeros(flat.shape[0], device=flat.device), None
        if self._through:
            x = to_one_hot(x, self.num_classes)
        for position, transform in reversed([*enumerate(self.transforms)]):
            last = position == 0
            x, ladj, weight = self._train(transform, x, context, last)
            total = total + ladj
        return (self.base.objective(x, context, weight) + total).reshape(shape)

    def _train(
        self, transform: DiscreteTransform, y: Tensor, context: Tensor | None, last: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Trains and inverts one transform; if it is the last, only what the base has to see."""
        if (
            not isinstance(transform, ConditionalTransform)
            or not transform.draws_levels
            or is_one_hot(y)
        ):
            x, ladj = transform.inverse_and_ladj(y, context)
            return x, ladj, None
        drawn = transform.draw(y, context)
        if last and self.base.scores_parts:
            return drawn
        with torch.no_grad():
            x = transform.inverse(y, context)
        return x, drawn.ladj, None

    def _drawn_flow(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Trains one flow an example; the base, by the examples that reach it."""
        number = num_flows = len(self.conditional_transforms)
        choice = torch.randint(num_flows, y.shape[:1], device=y.device)
        total = torch.zeros(y.shape[0], device=y.device)
        rows = torch.arange(y.shape[0], device=y.device)
        weight: Tensor | None = None
        for position, transform in reversed([*enumerate(self.transforms)]):
            part = None if context is None else context[rows]
            if not isinstance(transform, ConditionalTransform):
                y = transform.inverse(y, part)
                continue
            number -= 1
            chosen = choice[rows] == number
            last = position == 0
            if chosen.any():
                trained, ladj, weight = self._train(
                    transform, y[chosen], None if part is None else part[chosen], last
                )
                total = _add_at(total, rows[chosen], num_flows * ladj)
            else:
                total = total + _idle(transform)
            if number == 0:
                # Those that are left chose this flow, and only they go on to the base.
                rows, y = rows[chosen], trained if chosen.any() else y[chosen]
                continue
            with torch.no_grad():
                part = None if part is None else part[~chosen]
                rows, y = rows[~chosen], transform.inverse(y[~chosen], part)
        if not len(rows):
            return total + _idle(self.base)
        score = self.base.objective(y, None if context is None else context[rows], weight)
        return _add_at(total, rows, num_flows * score)

    def _flow_in_turn(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Trains the flow whose turn it is, all others being as they are, and the base."""
        joint, turn = divmod(self._turn, len(self.conditional_transforms))
        number = 0
        total = torch.zeros(y.shape[0], device=y.device)
        for position, transform in reversed([*enumerate(self.transforms)]):
            if not isinstance(transform, ConditionalTransform):
                y = transform.inverse(y, context)
                continue
            if number != turn:
                ladj = _idle(transform)
                with torch.no_grad():
                    y = transform.inverse(y, context)
            elif joint:
                y, ladj = transform.policy(y, self._beneath(position), context)
            else:
                y, ladj, _ = self._train(transform, y, context, last=False)
            total = total + ladj
            number += 1
        return self.base.objective(y, context) + total

    def _beneath(self, position: int) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Returns the log-likelihood (N,) of values (N, d) that a transform hands down."""

        def log_prob(x: Tensor, context: Tensor | None) -> Tensor:
            for transform in reversed(self.transforms[:position]):
                x = transform.inverse(x, context)
            return self.base.log_prob(x, context).sum(dim=-1)

        return log_prob

    def residuals(self, y: Tensor, context: Tensor | None = None) -> list[Tensor]:
        """Returns what is left of y after each transform was undone, the data's side first.

        Args:
            y: Indices (…, d).
            context: As in :meth:`log_prob`.

        Returns:
            Indices (…, d), one tensor a transform; the last is x.
        """
        flat, context, shape = flatten_batch(self._check(y), self.encode_context(context))
        values = []
        with torch.no_grad():
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
    ) -> Tensor:
        """Draws exact samples.

        Args:
            sample_shape: Shape S of the samples.
            context: What the flow is conditioned on, (B, …).
            length: Dimensions d of an event; D by default.
            temperature: Divides the base's logits; 1 samples the flow itself.
            generator: Source of randomness.
            method: ``levels``: one evaluation a level; ``fixed_point``: iterations over all
                positions at once, until nothing changes. The samples are the same, and
                :attr:`evaluations` says how many were needed.
            prompt: What samples begin with, indices (n,), or one a sample in the shape of the
                samples; the rest is drawn from its exact distribution given the prompt. A flow can
                do so where the first dimensions depend on none behind them: base and transforms
                over the natural ordering, or blocks from left to right.

        Returns:
            Indices ``(*S, d)``, or ``(*S, B, d)`` with a context.

        Raises:
            UserError: If the temperature, length, method or prompt cannot be had.
        """
        if not 0 < temperature < math.inf:
            raise UserError(f"temperature is {temperature}: give a positive number")
        if method not in ("levels", "fixed_point"):
            raise UserError(f"method is {method!r}: give 'levels' or 'fixed_point'")
        if method == "fixed_point" and self._acceleration.cuda_graph:
            raise UserError(
                "method is 'fixed_point', which looks whether the values have settled, and a CUDA "
                "graph cannot: take 'levels', or leave cuda_graph away"
            )
        return self._sample(
            torch.Size(sample_shape),
            self.encode_context(context),
            length=self._event(length),
            temperature=temperature,
            generator=generator,
            method=method,
            prompt=prompt,
        )

    def _check_prompt(self, prompt: Tensor, shape: torch.Size, length: int) -> Tensor:
        """Returns a prompt (N, n), one a sample."""
        number = prompt.shape[-1] if prompt.ndim else 0
        if not 1 <= number <= length:
            raise UserError(
                f"a prompt {tuple(prompt.shape)} was given, and samples have {length} dimensions: "
                "give it 1 to that many"
            )
        prompt = self._check(prompt, wait=True)
        if prompt.shape[:-1] not in (torch.Size(), shape):
            raise UserError(
                f"a prompt {tuple(prompt.shape)} was given for samples {(*shape, length)}: give "
                f"one for all, ({number},), or one a sample, {(*shape, number)}"
            )
        parts: list[Base | DiscreteTransform] = [self.base, *self.transforms]
        for part in parts:
            if not part.keeps_beginning(number, length):
                ordering = getattr(getattr(part, "conditioner", None), "ordering", None)
                raise UserError(
                    f"a prompt of {number} dimensions cannot be conditioned on exactly: in "
                    f"{type(part).__name__}"
                    + (f" over {ordering!r}" if ordering is not None else "")
                    + " they depend on dimensions behind them; give no prompt, or train a model "
                    "over the natural ordering"
                )
        return prompt.expand(*shape, number).reshape(-1, number)

    def accelerate(self, *, compile: bool = False, cuda_graph: bool = False) -> None:  # noqa: A002
        """Sets how samples are computed from now on; those of a seed stay the same to round-off.

        The first samples of every shape take longer: seconds to compile, and some to capture.

        Args:
            compile: Whether ``torch.compile`` compiles the parts that are run level by level.
            cuda_graph: Whether to capture all levels as one CUDA graph and replay it; only on a
                CUDA device, and not by the fixed point, which looks whether values have settled.

        Example:
            >>> from dflows import FactorizedBase
            >>> flow = DiscreteFlow(FactorizedBase(3, 4))
            >>> flow.accelerate(cuda_graph=True)
            >>> flow.sample((2,))
            Traceback (most recent call last):
            ...
            dflows.errors.UserError: cuda_graph is set, and the model is on cpu: a CUDA graph ...
        """
        self._acceleration = Acceleration(compile=compile, cuda_graph=cuda_graph)

    def _event(self, length: int | None) -> int:
        length = self.length if length is None else length
        if not 1 <= length <= self.length:
            raise UserError(f"length is {length}: give 1 to {self.length}, the flow's own")
        return length

    def _sample(
        self,
        shape: torch.Size,
        context: Tensor | None,
        *,
        length: int,
        temperature: float,
        generator: Generator | None,
        method: Method,
        prompt: Tensor | None = None,
    ) -> Tensor:
        if context is not None:
            shape = shape + context.shape[:1]
            repeats = shape.numel() // max(context.shape[0], 1)
            context = repeat_context(context, repeats)
        noise = self.base.noise(shape.numel(), length, generator)
        if prompt is not None:
            prompt = self._check_prompt(prompt.to(noise.device), shape, length)
        value, self.evaluations = self._acceleration(
            self._from_noise,
            self,
            (noise, context, prompt),
            temperature=temperature,
            fixed_point=method == "fixed_point",
        )
        return value.reshape(*shape, length)

    def _from_noise(
        self,
        noise: Tensor,
        context: Tensor | None,
        prompt: Tensor | None,
        *,
        temperature: float,
        fixed_point: bool,
    ) -> tuple[Tensor, list[int]]:
        known: list[Tensor | None] = [None] * (1 + len(self.transforms))
        if prompt is not None:
            known[:] = beginnings(self.transforms, prompt, noise.shape[1], context)
        value, count = self.base.from_noise(
            noise,
            context,
            temperature=temperature,
            fixed_point=fixed_point,
            beginning=known[0],
        )
        evaluations = [count]
        for transform, beginning in zip(self.transforms, known[1:], strict=True):
            value, count = transform.generate(
                value, context, beginning=beginning, fixed_point=fixed_point
            )
            evaluations.append(count)
        return value, evaluations

    @torch.no_grad()
    def greedy(self, context: Tensor | None = None, *, length: int | None = None) -> Tensor:
        """Decodes greedily: the base's most likely values, each given those before it, as data.

        Where the dimensions of the base are independent this is the flow's mode
        (:attr:`FlowDistribution.mode`), for a bijection moves probabilities and changes none. Over
        an autoregressive base it need not be.

        Args:
            context: What the flow is conditioned on, (B, …).
            length: Dimensions d of an event; D by default.

        Returns:
            Indices (d,), or (B, d) with a context.

        Raises:
            UserError: If the length cannot be had.
        """
        return self._greedy(self.encode_context(context), self._event(length))

    def _greedy(self, context: Tensor | None, length: int) -> Tensor:
        number = 1 if context is None else context.shape[0]
        value = self.base.greedy(number, length, context)
        for transform in self.transforms:
            value = transform(value, context)
        return value.squeeze(0) if context is None else value

    def start(self, counts: Tensor) -> None:
        """Starts the base from the counts of the training data's classes, before training.

        Args:
            counts: Counts (K,), or (D, K) of every dimension's own.
        """
        self.base.start(counts)


class FlowDistribution(Distribution):
    """Creates the distribution of y that a flow is, given a context.

    Its batch shape is that of the context, its event shape (D,).

    Arguments:
        flow: The flow.
        context: Encoded context (B, C) or (B, S, C), or nothing.
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
        """Events of D integers 0..K-1."""
        return constraints.independent(
            constraints.integer_interval(0, self.flow.num_classes - 1), 1
        )

    @property
    def mode(self) -> Tensor:
        """The most likely event, indices ``(*batch_shape, D)``.

        Raises:
            UserError: If the dimensions of the base are not independent, so that only a search
                would find it.
        """
        base = self.flow.base
        if not base.greedy_is_mode:
            raise UserError(
                f"the mode of a flow on {type(base).__name__} takes a search over all events: "
                "flow.greedy(context) decodes greedily, and a FactorizedBase has its mode there"
            )
        with torch.no_grad():
            return self.flow._greedy(self.context, self.flow.length)

    def log_prob(self, value: Tensor) -> Tensor:
        """Computes the exact log-probability of indices (…, d), in nats.

        Raises:
            UserError: If `value` lies outside the support.
        """
        value = self.flow._check(value, wait=True)
        context = self.context
        if context is not None and value.ndim == 1:
            value = value.expand(*self.batch_shape, -1)
        return self.flow._log_prob(value, context)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws exact samples, indices ``(*sample_shape, *batch_shape, D)``."""
        return self.flow._sample(
            torch.Size(sample_shape),
            self.context,
            length=self.flow.length,
            temperature=1.0,
            generator=None,
            method="levels",
        )
