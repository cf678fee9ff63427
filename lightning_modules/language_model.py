"""The first opponent: an autoregressive language model."""

from collections.abc import Callable
from typing import Literal

from torch import nn

from dflows.bases import AutoregressiveBase
from dflows.conditioner import Execution
from dflows.flow import DiscreteFlow
from dflows.orderings import Ordering
from lightning_modules.base import DEFAULT_OPTIMIZATION, Optimization
from lightning_modules.flow import DiscreteFlowModule

__all__ = ["LanguageModel"]


class LanguageModel(DiscreteFlowModule):
    r"""Creates an autoregressive model of windows and trains it.

    .. math:: p(y) = \prod_d p(y_d \mid y_e : \ell_e < \ell_d)

    It is a base without a flow: over the natural ordering a language model, drawn in D passes.

    Arguments:
        num_classes: K; taken from the data where a command builds the module.
        length: D; likewise.
        backbone: The network: called without arguments.
        ordering: Which dimensions condition which; natural where it is not given.
        draw: As in :class:`dflows.bases.AutoregressiveBase`, as are the three that follow.
        width: Features of one dimension, where the backbone does not tell its own.
        execution: How the backbone is run.
        positions: Whether a learned embedding of positions is added.
        context_encoder: Maps what the data are conditioned on to vectors (B, C) or sequences
            (B, S, C).
        context_features: C, of a conditional model.
        align_context: Whether position d of the context belongs to dimension d.
        optimization: Settings of the optimizer.

    Raises:
        UserError: If the choices do not fit each other.

    Example:
        >>> from functools import partial
        >>> from dflows.backbones import LSTM
        >>> LanguageModel(27, 16, partial(LSTM, width=8)).flow.passes
        16
    """

    def __init__(
        self,
        num_classes: int,
        length: int,
        backbone: Callable[[], nn.Module],
        *,
        ordering: Ordering | None = None,
        draw: Literal["all", "level"] = "all",
        width: int | None = None,
        execution: Execution = "auto",
        positions: bool | None = None,
        context_encoder: nn.Module | None = None,
        context_features: int | None = None,
        align_context: bool = False,
        optimization: Optimization = DEFAULT_OPTIMIZATION,
    ) -> None:
        base = AutoregressiveBase(
            num_classes,
            length,
            backbone=backbone(),
            ordering=ordering,
            draw=draw,
            width=width,
            execution=execution,
            positions=positions,
            context_features=context_features,
            align_context=align_context,
        )
        super().__init__(DiscreteFlow(base, (), context_encoder), optimization)
