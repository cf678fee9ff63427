"""Ready-made flows: classes, length and orderings are given once.

Each is a function that returns a :class:`~dflows.flow.DiscreteFlow`; in a configuration it is the
`class_path` of a flow, which takes `num_classes` and `length` from the data.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from torch import nn

from dflows.arguments import check_layers
from dflows.backbones import LSTM, DilatedConvolution, LevelConvolution, Transformer
from dflows.bases import AnyOrderBase, AutoregressiveBase, Base, FactorizedBase
from dflows.bijections import Bijection, PerDimension, RankPermutation
from dflows.classes import NumClasses, numbers_of
from dflows.conditioner import Conditioner
from dflows.embedding import Context
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.ngrams import NGramExpert
from dflows.orderings import Halves, Natural, Ordering, Parity, Reversed, Strided
from dflows.transforms import ConditionalTransform

__all__ = [
    "AutoregressiveFactory",
    "any_order",
    "autoregressive",
    "bipartite",
    "language_model",
    "stack",
    "strided",
]

WIDTH = 96
"""Width of the default networks."""


class AutoregressiveFactory:
    """Creates a factory of an autoregressive base, called once K and D are known.

    Args:
        backbone: The network.
        ordering: Which dimensions condition which; natural by default.
        context: What it is conditioned on; its encoder belongs to the flow.
        ngram_order: As in :func:`stack`; only for a base without transforms.

    Example:
        >>> AutoregressiveFactory(LSTM(width=8))(num_classes=3, length=4).passes
        4
    """

    def __init__(
        self,
        backbone: nn.Module,
        ordering: Ordering | None = None,
        context: Context | None = None,
        ngram_order: int | None = None,
    ) -> None:
        self.backbone = backbone
        self.ordering = ordering or Natural()
        self.context = context
        self.ngram_order = ngram_order
        self._made = False

    def __call__(self, num_classes: NumClasses, length: int) -> AutoregressiveBase:
        """Makes the base.

        Raises:
            UserError: If it was called before: two bases would share the network.
        """
        if self._made:
            raise UserError(
                "an AutoregressiveFactory was called twice, and both bases would share one "
                "network: make a factory for each"
            )
        self._made = True
        return AutoregressiveBase(
            Conditioner(
                num_classes,
                length,
                self.ordering,
                self.backbone,
                context=self.context,
                expert=_expert(num_classes, self.ngram_order),
            )
        )


BaseFactory: TypeAlias = Callable[[Any, int], Base] | AutoregressiveFactory
"""Makes the distribution of x, given K and D."""


def _expert(num_classes: NumClasses, ngram_order: int | None) -> NGramExpert | None:
    if ngram_order is None:
        return None
    number = numbers_of(num_classes)
    if not isinstance(number, int):
        raise UserError(
            f"ngram_order is {ngram_order}, and num_classes has a number for each dimension: "
            "n-grams are of the same classes everywhere, so leave it away"
        )
    return NGramExpert(number, ngram_order)


def stack(
    num_classes: NumClasses,
    length: int,
    orderings: list[Ordering],
    backbone: Callable[[], nn.Module],
    bijection: Callable[[int], Bijection] = RankPermutation,
    base: BaseFactory = FactorizedBase,
    *,
    share_backbone: bool = False,
    context: Context | None = None,
    ngram_order: int | None = None,
) -> DiscreteFlow:
    """Makes a flow of one conditional transform an ordering.

    Args:
        num_classes: K, or one number a dimension.
        length: D.
        orderings: Which dimensions condition which: one a transform, base → data.
        backbone: Makes the network of a transform.
        bijection: Makes what is done to one variable, given K.
        base: Makes the distribution of x, given K and D.
        share_backbone: Whether one network serves all transforms; embeddings and heads are their
            own.
        context: What the transforms are conditioned on.
        ngram_order: n, for an n-gram expert in the transform next to the data
            (:class:`dflows.ngrams.NGramExpert`).

    Raises:
        UserError: If the choices do not fit each other.

    Example:
        >>> from functools import partial
        >>> network = partial(DilatedConvolution, width=8)
        >>> stack(27, 16, [Strided(4)], network).passes
        3
    """
    if ngram_order is not None and not orderings:
        raise UserError(
            f"ngram_order is {ngram_order}, and there is no transform to condition on n-grams: "
            "give orderings, or unset ngram_order"
        )
    numbers = numbers_of(num_classes)
    shared = backbone() if share_backbone else None
    transforms = []
    for number, ordering in enumerate(orderings, start=1):
        mapping = (
            bijection(numbers) if isinstance(numbers, int) else PerDimension(bijection, numbers)
        )
        conditioner = Conditioner(
            num_classes,
            length,
            ordering,
            backbone() if shared is None else shared,
            num_logits=mapping.num_logits,
            context=context,
            expert=_expert(num_classes, ngram_order) if number == len(orderings) else None,
        )
        transforms.append(ConditionalTransform(mapping, conditioner))
    encoder = None if context is None else context.encoder
    return DiscreteFlow(base(num_classes, length), transforms, encoder)


def bipartite(
    num_classes: NumClasses,
    length: int,
    backbone: Callable[[], nn.Module] | None = None,
    *,
    num_transforms: int = 2,
    parts: Literal["parity", "halves"] = "parity",
    bijection: Callable[[int], Bijection] = RankPermutation,
    base: BaseFactory = FactorizedBase,
    context: Context | None = None,
) -> DiscreteFlow:
    """Makes the paper's bipartite flow: each part of the dimensions given the other, alternating.

    Generation takes one network evaluation a transform.

    Args:
        num_classes: K, or one number a dimension.
        length: D.
        backbone: Makes the network of a transform, of any kind; a dilated convolution by default.
        num_transforms: Number of transforms; the parts alternate.
        parts: Even and odd dimensions (``parity``), or the left and the right half (``halves``).
        bijection: Makes what is done to one variable, given K.
        base: Makes the distribution of x, given K and D.
        context: What the transforms are conditioned on.

    Raises:
        UserError: If the choices do not fit each other.

    Example:
        >>> flow = bipartite(num_classes=27, length=16)
        >>> flow.sample((2,)).shape, flow.passes
        (torch.Size([2, 16]), 2)
    """
    if parts not in ("parity", "halves"):
        raise UserError(f"parts is {parts!r}: give 'parity' or 'halves'")
    part = Parity if parts == "parity" else Halves
    return stack(
        num_classes,
        length,
        [part(first=number % 2) for number in range(_checked(num_transforms))],
        backbone or _dilated_convolution,
        bijection,
        base,
        context=context,
    )


def autoregressive(
    num_classes: NumClasses,
    length: int,
    backbone: Callable[[], nn.Module] | None = None,
    *,
    num_transforms: int = 1,
    bijection: Callable[[int], Bijection] = RankPermutation,
    base: BaseFactory = FactorizedBase,
    context: Context | None = None,
    ngram_order: int | None = None,
) -> DiscreteFlow:
    """Makes the paper's autoregressive flow: every dimension given all before it.

    The orderings alternate, from left to right next to the data. The likelihood takes one network
    evaluation a transform, generation D - 1.

    Args:
        num_classes: K, or one number a dimension.
        length: D.
        backbone: Makes the network of a transform; an LSTM by default.
        num_transforms: Number of transforms.
        bijection: Makes what is done to one variable, given K.
        base: Makes the distribution of x, given K and D.
        context: What the transforms are conditioned on.
        ngram_order: As in :func:`stack`.

    Raises:
        UserError: If the choices do not fit each other.

    Example:
        >>> autoregressive(num_classes=27, length=16).passes
        15
    """
    count = _checked(num_transforms)
    orderings: list[Ordering] = [Reversed() if left % 2 else Natural() for left in range(count)]
    return stack(
        num_classes,
        length,
        orderings[::-1],
        backbone or _lstm,
        bijection,
        base,
        context=context,
        ngram_order=ngram_order,
    )


def strided(
    num_classes: NumClasses,
    length: int,
    columns: int,
    backbone: Callable[[], nn.Module] | None = None,
    *,
    bijection: Callable[[int], Bijection] = RankPermutation,
    base: BaseFactory = FactorizedBase,
    context: Context | None = None,
    ngram_order: int | None = None,
) -> DiscreteFlow:
    """Makes a few-pass flow: dimensions as rows of so many columns, column by column.

    Generation takes `columns` - 1 network evaluations, whatever the length.

    Args:
        num_classes: K, or one number a dimension.
        length: D.
        columns: Number of columns, which are the levels.
        backbone: Makes the network; a level-causal convolution by default.
        bijection: Makes what is done to one variable, given K.
        base: Makes the distribution of x, given K and D.
        context: What the transform is conditioned on.
        ngram_order: As in :func:`stack`.

    Raises:
        UserError: If the choices do not fit each other.

    Example:
        >>> strided(num_classes=27, length=64, columns=8).passes
        7
    """
    return stack(
        num_classes,
        length,
        [Strided(columns)],
        backbone or _level_convolution,
        bijection,
        base,
        context=context,
        ngram_order=ngram_order,
    )


def language_model(
    num_classes: NumClasses,
    length: int,
    backbone: Callable[[], nn.Module] | None = None,
    *,
    ordering: Ordering | None = None,
    context: Context | None = None,
    ngram_order: int | None = None,
) -> DiscreteFlow:
    """Makes an autoregressive base without a transform: in the natural ordering, a language model.

    Args:
        num_classes: K, or one number a dimension.
        length: D.
        backbone: Makes the network; an LSTM by default.
        ordering: Which dimensions condition which; natural by default.
        context: What it is conditioned on.
        ngram_order: n, for an n-gram expert (:class:`dflows.ngrams.NGramExpert`).

    Raises:
        UserError: If the choices do not fit each other.

    Example:
        >>> language_model(num_classes=27, length=16).passes
        16
    """
    make = AutoregressiveFactory((backbone or _lstm)(), ordering, context, ngram_order)
    encoder = None if context is None else context.encoder
    return DiscreteFlow(make(num_classes, length), (), encoder)


def any_order(
    num_classes: NumClasses,
    length: int,
    backbone: Callable[[], nn.Module] | None = None,
    *,
    ordering: Ordering | None = None,
    context: Context | None = None,
) -> DiscreteFlow:
    """Makes a base with one network for all orderings: any dimensions given any others.

    Train it with :class:`dflows.objectives.RandomOrderings`.

    Args:
        num_classes: K, or one number a dimension.
        length: D.
        backbone: Makes the network, one that runs masked; a Transformer of full attention by
            default.
        ordering: That of likelihoods and samples, until another is asked for
            (:meth:`dflows.DiscreteFlow.with_ordering`); natural by default.
        context: What it is conditioned on.

    Raises:
        UserError: If the choices do not fit each other.

    Example:
        >>> flow = any_order(num_classes=[2, 5, 3, 4], length=4)
        >>> flow.passes, flow.with_ordering(Strided(2)).passes
        (4, 2)
    """
    conditioner = Conditioner(
        num_classes,
        length,
        ordering or Natural(),
        (backbone or _full_attention)(),
        context=context,
        any_order=True,
    )
    encoder = None if context is None else context.encoder
    return DiscreteFlow(AnyOrderBase(conditioner), (), encoder)


def _checked(num_transforms: int) -> int:
    check_layers(num_transforms=num_transforms)
    return num_transforms


def _dilated_convolution() -> nn.Module:
    return DilatedConvolution(WIDTH)


def _level_convolution() -> nn.Module:
    return LevelConvolution(WIDTH, window=8)


def _full_attention() -> nn.Module:
    return Transformer(WIDTH, attention="full")


def _lstm() -> nn.Module:
    return LSTM(2 * WIDTH)
