"""The conditional transform: a bijection of every dimension, given those of lower levels."""

import torch
from torch import Tensor

from dflows.bijections import Bijection
from dflows.classes import Classes
from dflows.conditioner import Conditioner
from dflows.decoding import decide_levels, solve_fixed_point
from dflows.errors import UserError
from dflows.orderings import Ordering
from dflows.representations import flatten_batch
from dflows.transforms.transform import DiscreteTransform

__all__ = ["ConditionalTransform"]


class ConditionalTransform(DiscreteTransform):
    r"""Creates a transform of every dimension, given the dimensions of lower levels.

    .. math:: y_d = b(x_d; \theta_d), \qquad \theta_d = \text{network}(y_{e} : \ell_e < \ell_d)

    with b a bijection of one K-class variable and :math:`\ell` the levels of an ordering; the
    dimensions of level 0 stay as they are. Data → base is one evaluation of a level-causal
    backbone; base → data takes one a level. With all levels distinct it is the paper's
    autoregressive transform, with two levels its bipartite one.

    It starts as the identity.

    Args:
        bijection: The map of one variable.
        conditioner: The network over its ordering, with the bijection's number of logits.

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
        >>> bijection, network = ModularAffine(5), DilatedConvolution(width=16, layers=2)
        >>> transform = ConditionalTransform(
        ...     bijection, Conditioner(5, 8, Strided(4), network, bijection.num_logits)
        ... )
        >>> transform.passes
        3
        >>> x = torch.randint(5, (2, 8))
        >>> torch.equal(transform.inv(transform(x)), x)
        True
    """

    def __init__(self, bijection: Bijection, conditioner: Conditioner) -> None:
        super().__init__()
        name = type(bijection).__name__
        own = Classes(bijection.each or bijection.num_classes, conditioner.length)
        if conditioner.classes != own:
            raise UserError(
                f"a {name} of {own} classes was given a conditioner of {conditioner.classes}: give "
                "both the same num_classes"
            )
        if conditioner.num_logits != bijection.num_logits:
            raise UserError(
                f"a {name} reads {bijection.num_logits} logits, and the conditioner has "
                f"{conditioner.num_logits}: give it num_logits={bijection.num_logits}"
            )
        if conditioner.num_levels < 2:
            raise UserError(
                f"{conditioner.ordering!r} gives all {conditioner.length} dimensions the same "
                "level, so that nothing is transformed: choose an ordering of two levels or more, "
                "or a greater length"
            )
        self.bijection = bijection
        self.conditioner = conditioner
        conditioner.init_head(bijection.initial_logits())

    @property
    def length(self) -> int:
        """D."""
        return self.conditioner.length

    @property
    def ordering(self) -> Ordering:
        return self.conditioner.ordering

    def keeps(self, classes: Classes) -> bool:
        return self.conditioner.classes == classes

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        return self.conditioner.takes_context

    @property
    def passes(self) -> int:
        return self.conditioner.num_levels - 1

    def transformed(self, value: Tensor) -> Tensor:
        """Returns the dimensions (n,) of level 1 and above, of a value (N, d) or (N, d, K)."""
        members = self.conditioner.layout(value.shape[1], value.device).members
        return torch.cat([members[0][:0], *members[1:]]).sort().values

    def logits(self, y: Tensor, dimensions: Tensor, context: Tensor | None = None) -> Tensor:
        """Computes the logits (N, n, num_logits) of transformed dimensions, given y (N, d)."""
        logits: Tensor = self.conditioner(y, context, first_level=1)
        return logits[:, dimensions]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.generate(x, context)[0]

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        y, context, shape = flatten_batch(y, context)
        dimensions = self.transformed(y)
        logits = self.logits(y, dimensions, context)
        part = self.bijection.at(dimensions).inverse(y[:, dimensions], logits)
        x = y.index_copy(1, dimensions, part.to(y.dtype))
        return x.reshape(shape + x.shape[1:])

    def by_levels(
        self, value: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> Tensor:
        flat, context, shape = flatten_batch(value, context)
        mapped = flat.clone()

        def decide(dimensions: Tensor, logits: Tensor) -> Tensor:
            part, bijection = flat[:, dimensions], self.bijection.at(dimensions)
            image: Tensor = (bijection.inverse if inverse else bijection)(part, logits)
            mapped[:, dimensions] = image
            return part if inverse else image

        # In neither direction does the network see a value of this or of a higher level.
        y = flat.index_fill(1, self.transformed(flat), 0)
        decide_levels(self.conditioner, y, decide, context, first_level=1)
        return mapped.reshape(shape + mapped.shape[1:])

    def supports_prefix(self, number: int, length: int) -> bool:
        return self.conditioner.supports_prefix(number, length)

    def generate(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
        fixed_point: bool = False,
    ) -> tuple[Tensor, int]:
        flat, context, shape = flatten_batch(x, context)
        y, known = flat, 0
        if prefix is not None:
            known = prefix.shape[-1]
            y = torch.cat([prefix.reshape(-1, known), flat[:, known:]], dim=1)

        def decide(dimensions: Tensor, logits: Tensor) -> Tensor:
            value: Tensor = self.bijection.at(dimensions)(flat[:, dimensions], logits)
            return value.to(flat.dtype)

        if fixed_point:
            y, evaluations = solve_fixed_point(
                self.conditioner, y, decide, context, prefix_length=known, first_level=1
            )
        else:
            evaluations = self.passes
            y = decide_levels(
                self.conditioner, y, decide, context, prefix_length=known, first_level=1
            )
        return y.reshape(shape + y.shape[1:]), evaluations
