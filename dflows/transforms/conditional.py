"""The conditional transform over an ordering, and its two famous cases."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dflows.bijections import Bijection
from dflows.conditioner import Conditioner, Execution
from dflows.errors import UserError
from dflows.estimators import Estimator, JointInTurn, LocalObjective
from dflows.ngrams import NGrams
from dflows.orderings import Natural, Ordering, Parity
from dflows.representations import flatten_batch, is_one_hot, to_one_hot
from dflows.transforms.transform import DiscreteTransform

__all__ = [
    "AutoregressiveTransform",
    "BipartiteTransform",
    "ConditionalTransform",
    "Drawn",
]


class Drawn(NamedTuple):
    """What one training step sees of a flow of which it draws one level an example.

    `x` (N, d) is right where `weight` (N, d) is not 0; the weights make a sum over dimensions
    unbiased. `ladj` (N,) are zeros with the gradient of the flow's own objective.
    """

    x: Tensor
    ladj: Tensor
    weight: Tensor


class ConditionalTransform(DiscreteTransform):
    r"""Creates a transform of every dimension, given the dimensions of lower levels.

    .. math:: y_d = b(x_d; \theta_d), \qquad \theta_d = \text{network}(y_{e} : \ell_e < \ell_d)

    with b a bijection of one K-class variable and :math:`\ell` the levels of an ordering; the
    dimensions of level 0 are handed through. Data → base is one evaluation of a level-causal
    backbone; base → data takes one a level.

    Arguments:
        length: D, the largest number of dimensions.
        bijection: What is done to one variable.
        ordering: Which dimensions condition which.
        backbone: The network, from features (N, D, width) to features (N, D, width). Transforms
            may share one: their embeddings and heads are their own.
        estimator: How learning passes the discrete choice.
        width: As in :class:`dflows.conditioner.Conditioner`, as are the rest.
        execution: How the backbone is run.
        positions: Whether a learned embedding of positions is added.
        context_features: Features of a context.
        align_context: Whether position d of the context belongs to dimension d.
        grams: N-grams of y that are added to the logits.

    Raises:
        UserError: If the parts do not fit each other.

    References:
        | Discrete Flows (Tran et al., 2019)
        | https://arxiv.org/abs/1905.10347

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from dflows.backbones import DilatedConvolution
        >>> from dflows.bijections import ModularAffine
        >>> from dflows.orderings import Strided
        >>> transform = ConditionalTransform(
        ...     length=8,
        ...     bijection=ModularAffine(5),
        ...     ordering=Strided(columns=4),
        ...     backbone=DilatedConvolution(width=16, layers=2),
        ... )
        >>> transform.passes
        3
        >>> x = torch.randint(5, (2, 8))
        >>> torch.equal(transform.inv(transform(x)), x)
        True
    """

    def __init__(
        self,
        length: int,
        bijection: Bijection,
        ordering: Ordering,
        backbone: nn.Module,
        estimator: Estimator | None = None,
        *,
        width: int | None = None,
        execution: Execution = "auto",
        positions: bool | None = None,
        context_features: int | None = None,
        align_context: bool = False,
        grams: NGrams | None = None,
    ) -> None:
        super().__init__()
        self.bijection = bijection
        self.conditioner = Conditioner(
            bijection.num_classes,
            length,
            bijection.num_logits,
            ordering,
            backbone,
            width=width,
            execution=execution,
            positions=positions,
            context_features=context_features,
            align_context=align_context,
            grams=grams,
        )
        # The identity: it is made explicit by the bias, with every weight of the head at 0.
        with torch.no_grad():
            self.conditioner.head.weight.zero_()
            self.conditioner.head.bias.copy_(bijection.initial_logits())
        self.train_by(estimator or LocalObjective())

    def train_by(self, estimator: Estimator) -> None:
        """Sets the estimator, before the transform becomes part of a flow.

        Args:
            estimator: The estimator. One that aims at a distribution of x of its own starts at one
                that is peaked on class 0.

        Raises:
            UserError: If it cannot train the bijection.
        """
        estimator.check(self.bijection)
        self.estimator = estimator
        if self.bijection.needs_target and not estimator.through:
            weight = self.conditioner.head.weight
            peaked = to_one_hot(torch.tensor(0), self.bijection.num_classes).to(weight)
            self.target = nn.Parameter(peaked * math.log(self.bijection.num_classes))
        else:
            self.register_parameter("target", None)

    @property
    def length(self) -> int:
        """D."""
        return self.conditioner.length

    @property
    def ordering(self) -> Ordering:
        """Which dimensions condition which."""
        return self.conditioner.ordering

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        return self.conditioner.context is not None

    @property
    def passes(self) -> int:
        return self.conditioner.passes

    def _target(self) -> Tensor | None:
        return None if self.target is None else self.target.log_softmax(dim=-1)

    def _transformed(self, value: Tensor) -> Tensor:
        """Returns the dimensions (n,) of level 1 and above."""
        _, members = self.conditioner.levels(value.shape[1], value.device)
        empty = members[0][:0]
        return torch.cat([empty, *members[1:]]).sort().values

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, context, shape = flatten_batch(x, context)
        one_hot = is_one_hot(x)
        ladj = torch.zeros(x.shape[0], device=x.device)

        def decide(dimensions: Tensor, logits: Tensor) -> Tensor:
            nonlocal ladj
            part = x[:, dimensions]
            if not one_hot:
                return self.bijection(part, logits)
            y, ladj = self.estimator.forward_map(self.bijection, part, logits, ladj)
            return y.to(x.dtype)

        y = self.conditioner.by_levels(x, decide, context)
        return y.reshape(shape + y.shape[1:]), ladj.reshape(shape)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, context, shape = flatten_batch(y, context)
        ladj = torch.zeros(y.shape[0], device=y.device)
        dimensions = self._transformed(y)
        logits = self.conditioner(y, context)[:, dimensions]
        part = y[:, dimensions]
        if torch.is_grad_enabled() and (is_one_hot(y) or not self.estimator.through):
            part, ladj = self.estimator.inverse(self.bijection, part, logits, ladj, self._target())
        elif is_one_hot(y):
            indices = self.bijection.inverse(part.argmax(dim=-1), logits)
            part = to_one_hot(indices, self.bijection.num_classes, y.dtype)
        else:
            part = self.bijection.inverse(part, logits)
        x = y.index_copy(1, dimensions, part.to(y.dtype))
        return x.reshape(shape + x.shape[1:]), ladj.reshape(shape)

    def keeps_beginning(self, number: int, length: int) -> bool:
        return self.conditioner.keeps_beginning(number, length)

    def generate(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        beginning: Tensor | None = None,
        fixed_point: bool = False,
    ) -> tuple[Tensor, int]:
        flat, context, shape = flatten_batch(x, context)
        y, known = flat, 0
        if beginning is not None:
            known = beginning.shape[-1]
            y = torch.cat([beginning.reshape(-1, known), flat[:, known:]], dim=1)

        def decide(dimensions: Tensor, logits: Tensor) -> Tensor:
            return self.bijection(flat[:, dimensions], logits)

        if fixed_point:
            y, evaluations = self.conditioner.fixed_point(y, decide, context, known)
        else:
            y, evaluations = self.conditioner.by_levels(y, decide, context, known), self.passes
        return y.reshape(shape + y.shape[1:]), evaluations

    @property
    def draws_levels(self) -> bool:
        """Whether a training step draws one level an example, where each costs an evaluation."""
        return self.estimator.draw != "all" and not self.conditioner.one_pass

    def policy(
        self, y: Tensor, log_prob: Callable[[Tensor, Tensor | None], Tensor], context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Inverts, and computes zeros with a policy's gradient, of an estimator that has one.

        Args:
            y: Indices (N, d).
            log_prob: The log-likelihood (M,) of indices (M, d) beneath the transform.
            context: Vectors (N, C) or sequences (N, S, C).

        Returns:
            Indices (N, d), and the zeros (N,).
        """
        estimator = self.estimator
        if not isinstance(estimator, JointInTurn):
            raise TypeError(f"a {type(estimator).__name__} has no policy")
        num_classes, dimensions = self.bijection.num_classes, self._transformed(y)
        logits, y_part = self.conditioner(y, context)[:, dimensions], y[:, dimensions]
        with torch.no_grad():
            x = y.index_copy(1, dimensions, self.bijection.inverse(y_part, logits))
            count = len(dimensions) * num_classes
            changed = x.unsqueeze(1).repeat(1, count, 1).unflatten(1, (-1, num_classes))
            classes = torch.arange(num_classes, device=y.device)
            numbers = torch.arange(len(dimensions), device=y.device)
            changed[:, numbers, :, dimensions] = classes
            rows = None if context is None else context.repeat_interleave(count, dim=0)
            values = log_prob(changed.flatten(0, 2), rows).unflatten(0, (len(y), -1, num_classes))
        return x, estimator.policy(self.bijection, y_part, logits, values)

    def draw(self, y: Tensor, context: Tensor | None = None) -> Drawn:
        """Draws one level an example, and inverts and trains that one alone.

        Args:
            y: Indices (N, d).
            context: Vectors (N, C) or sequences (N, S, C).
        """
        levels, members = self.conditioner.levels(y.shape[1], y.device)
        num_levels = len(members) - 1
        weight = (levels == 0).to(self.conditioner.head.weight.dtype).expand(y.shape)
        ladj = torch.zeros(y.shape[0], device=y.device)
        if num_levels == 0:
            return Drawn(y, ladj, weight)
        level = torch.randint(1, num_levels + 1, y.shape[:1], device=y.device)
        drawn, logits = self.conditioner.drawn_logits(y, level, context)
        local = self.bijection.local_log_likelihood(y[drawn], logits, self._target())
        local = num_levels * local
        example = drawn.nonzero()[:, 0]
        ladj = ladj.to(local.dtype).index_add(0, example, local - local.detach())
        x = y.masked_scatter(drawn, self.bijection.inverse(y[drawn], logits.detach()))
        return Drawn(x, ladj, weight + num_levels * drawn)


class AutoregressiveTransform(ConditionalTransform):
    """Creates a transform in which every dimension depends on all that come before it.

    It is the :class:`ConditionalTransform` over an ordering whose levels are all distinct. Data →
    base is one evaluation of a level-causal backbone, base → data takes D - 1.

    Arguments and options are those of :class:`ConditionalTransform`; the ordering is natural by
    default.

    Raises:
        UserError: If two dimensions share a level.
    """

    def __init__(
        self,
        length: int,
        bijection: Bijection,
        backbone: nn.Module,
        estimator: Estimator | None = None,
        *,
        ordering: Ordering | None = None,
        **options: Any,
    ) -> None:
        ordering = ordering or Natural()
        if len(ordering.levels(length).unique()) != length:
            raise UserError(
                f"{ordering!r} gives {length} dimensions fewer levels, and an autoregressive "
                "transform needs one each: use ConditionalTransform, or another ordering"
            )
        super().__init__(length, bijection, ordering, backbone, estimator, **options)


class BipartiteTransform(ConditionalTransform):
    """Creates a transform of one part of the dimensions, given the other.

    It is the :class:`ConditionalTransform` over an ordering of two levels, or of all dimensions
    behind a context (:class:`~dflows.orderings.BehindContext`). Both directions are one evaluation
    of any backbone, which is never handed the dimensions that are transformed.

    Arguments and options are those of :class:`ConditionalTransform`; the ordering is by parity by
    default.

    Raises:
        UserError: If the ordering has not two levels.
    """

    def __init__(
        self,
        length: int,
        bijection: Bijection,
        backbone: nn.Module,
        estimator: Estimator | None = None,
        *,
        ordering: Ordering | None = None,
        **options: Any,
    ) -> None:
        ordering = ordering or Parity()
        num_levels = int(ordering.levels(length).max()) + 1
        if num_levels != 2:
            raise UserError(
                f"{ordering!r} has {num_levels} levels over {length} dimensions, and a bipartite "
                "transform needs 2: use ConditionalTransform, or another ordering"
            )
        super().__init__(length, bijection, ordering, backbone, estimator, **options)
