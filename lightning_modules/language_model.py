"""The first opponent: an autoregressive language model."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from dflows.backbones import Transformer
from dflows.bases import AutoregressiveBase
from dflows.conditioner import Conditioner, Execution
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.ngrams import NGrams
from dflows.orderings import Ordering
from lightning_modules.auxiliary import Auxiliary, AuxiliaryHeads
from lightning_modules.base import DEFAULT_OPTIMIZATION, Batch, Optimization
from lightning_modules.carried import Carried, CarriedModule, Score

__all__ = ["LanguageModel"]


class State(NamedTuple):
    """What training windows go on from: the last characters (B,), and what an LSTM made of all."""

    last: Tensor
    hidden: Tensor
    cells: Tensor


class LanguageModel(CarriedModule):
    r"""Creates an autoregressive model of windows and trains it.

    .. math:: p(y) = \prod_d p(y_d \mid y_e : \ell_e < \ell_d)

    It is a base without a flow: over the natural ordering a language model, drawn in D passes.

    `test_bpc` is that of independent windows. Over the natural ordering, and without a context,
    testing logs `test_bpc_carried` too, where every character of the split is scored once, given
    more than its window: with an LSTM all that comes before it, by the state that one window hands
    to the next; with any other network the D - `carried_stride` characters before it at least, by
    windows of length D that overlap, of which the last `carried_stride` characters count.

    With `carry` an LSTM is also trained so, by back-propagation through windows that go on where
    those of the step before ended: the data must be ``consecutive``. Every window is still an event
    of its own to whoever scores it, and begins from a state of zero.

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
        ngram_order: Classes of the longest of the n-grams whose log-probabilities the network is
            told; none where it is not given.
        carry: Whether training carries the state of an LSTM from window to window.
        restart: Probability that a window of such a training begins anew nonetheless, so that the
            beginning of an event is learned too.
        carried_stride: Characters of an overlapping window that count; half of them where it is not
            given. Fewer see more, and cost more evaluations.
        auxiliary: Losses that are added to the objective; none where they are not given.
        optimization: Settings of the optimizer.

    Raises:
        UserError: If the choices do not fit each other.

    References:
        | Recurrent Batch Normalization (Cooijmans et al., 2016)
        | https://arxiv.org/abs/1603.09025
        | An Analysis of Neural Language Modeling at Multiple Scales (Merity et al., 2018)
        | https://arxiv.org/abs/1803.08240
        | Character-Level Language Modeling with Deeper Self-Attention (Al-Rfou et al., 2018)
        | https://arxiv.org/abs/1808.04444

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
        ngram_order: int | None = None,
        carry: bool = False,
        restart: float = 0.05,
        carried_stride: int | None = None,
        auxiliary: Auxiliary | None = None,
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
            grams=None if ngram_order is None else NGrams(num_classes, ngram_order),
        )
        super().__init__(DiscreteFlow(base, (), context_encoder), optimization)
        self.carry = carry
        self.restart = restart
        self.carried_stride = (length + 1) // 2 if carried_stride is None else carried_stride
        self.auxiliary = None if auxiliary is None else self._auxiliary_heads(auxiliary)
        self._check_carried()
        self._state: State | None = None
        self._states: list[Tensor] | None = None

    @property
    def conditioner(self) -> Conditioner:
        """The network, from the characters before a place to the logits of that place."""
        return cast("AutoregressiveBase", self.flow.base).conditioner

    def _check_carried(self) -> None:
        """Refuses settings of what goes from window to window that do not fit."""
        length = self.flow.length
        if not 1 <= self.carried_stride <= length:
            raise UserError(
                f"carried_stride is {self.carried_stride}: give a number from 1 to {length}, the "
                "length of a window"
            )
        if not 0 <= self.restart <= 1:
            raise UserError(f"restart is {self.restart}: give a probability from 0 to 1")
        if not self.carry:
            return
        if not self.conditioner.carries:
            raise UserError(
                f"carry is set, and a {type(self.conditioner.backbone).__name__} over "
                f"{self.conditioner.ordering!r} has no state to carry: choose an LSTM over "
                "Natural without a context, or unset carry"
            )
        if self.auxiliary is not None:
            raise UserError(
                "auxiliary losses are of windows that begin anew: unset carry or auxiliary"
            )

    def _auxiliary_heads(self, settings: Auxiliary) -> AuxiliaryHeads:
        conditioner = self.conditioner
        backbone = conditioner.backbone
        if not (conditioner.one_pass and conditioner.embeds and conditioner.left_to_right):
            raise UserError(
                "auxiliary losses need a level-causal backbone over Natural, without a context: "
                f"a {type(backbone).__name__} over {conditioner.ordering!r} is none"
            )
        layers = len(backbone.blocks) if isinstance(backbone, Transformer) else 1
        if settings.layers and layers == 1:
            raise UserError(
                "auxiliary.layers is set, and the network has no layer before its last that could "
                "be looked at: choose a Transformer of several, or set it to false"
            )
        return AuxiliaryHeads(self.flow.num_classes, conditioner.width, layers, settings)

    def prepare(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._state = self._states = None
        if self.carry and not data.consecutive:
            raise UserError(
                "carry is set, and the data are windows of any places: set consecutive of a "
                "TextDataModule, or unset carry"
            )
        super().prepare()

    def on_train_start(self) -> None:
        """Sees whether the layers of auxiliary losses ever end.

        Raises:
            UserError: If the training has no end.
        """
        super().on_train_start()
        if self.auxiliary is not None and self.auxiliary.settings.layers and not self.has_end:
            raise UserError(
                "the auxiliary losses of layers last for a part of the training, and it has no "
                "end: set trainer.max_steps or trainer.max_time"
            )

    def objective(self, batch: Batch) -> Tensor:
        y = self.indices_of(batch)
        if self.carry:
            return AutoregressiveBase.score(self._carried_logits(y), y).sum(dim=-1)
        if self.auxiliary is None:
            return super().objective(batch)
        with self.flow.without_own():
            logits, features = self.conditioner.layers(y)
        added: Tensor = self.auxiliary(features, y, self._done)
        # The value stays the log-likelihood; what is added is in the gradient alone.
        return AutoregressiveBase.score(logits, y).sum(dim=-1) + added - added.detach()

    def _carried_logits(self, y: Tensor) -> Tensor:
        """Computes the logits (B, D, K) of training windows that go on, and keeps the state."""
        last, state = y.new_full((len(y),), -1), None
        if self._state is not None and len(self._state.last) == len(y):
            last, *parts = (part.to(self.device) for part in self._state)
            state = parts[0], parts[1]
            anew = torch.rand(len(y), device=y.device) < self.restart
            last = last.masked_fill(anew, -1)
        logits, (hidden, cells) = self.conditioner.carry(y, last, state)
        self._state = State(y[:, -1], hidden.detach(), cells.detach())
        # Here, where all processes come by: the one that writes a checkpoint cannot ask the others.
        alone = self._trainer is None or self.trainer.world_size == 1
        self._states = [
            part.unsqueeze(0) if alone else cast("Tensor", self.all_gather(part))
            for part in self._state
        ]
        return logits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a resumed run needs to repeat the uninterrupted one."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["training"]["states"] = self._states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what :meth:`on_save_checkpoint` added."""
        super().on_load_checkpoint(checkpoint)
        states = checkpoint.get("training", {}).get("states")
        ranks = 1 if self._trainer is None else self.trainer.world_size
        if states is not None and len(states[0]) == ranks:
            self._states = states
            self._state = State(*(part[self.global_rank] for part in states))

    def text_score(self) -> Score | None:
        if self.conditioner.carries:
            return self._score_by_state()
        if self.conditioner.left_to_right:
            return Carried(self._score_by_overlap, self.flow.length - self.carried_stride)
        return None

    def _score_by_state(self) -> Score:
        """Returns what scores a text window by window, each from the state of the one before."""
        last, state = torch.full((1,), -1, device=self.device), None

        def score(text: Tensor) -> Tensor:
            nonlocal last, state
            found = []
            for window in text.split(self.flow.length):
                logits, state = self.conditioner.carry(window.unsqueeze(0), last, state)
                found.append(AutoregressiveBase.score(logits[0], window))
                last = window[-1:]
            return torch.cat(found)

        return score

    def _score_by_overlap(self, text: Tensor, known: int) -> Tensor:
        """Scores the characters (n,) of a text that come after those known, n of whole windows."""
        length, stride = self.flow.length, self.carried_stride
        new = len(text) - known
        begins = [
            known + window + begin
            for window in range(0, new, length)
            for begin in range(0, min(length, new - window), stride)
        ]
        ends = [*begins[1:], len(text)]
        at_once = max(1, new // length)
        whole = [end for end in ends if end >= length]
        short = ends[: len(ends) - len(whole)]
        scores = [self.flow.base.log_prob(text[:end].unsqueeze(0)) for end in short]
        windows = text.unfold(0, length, 1) if whole else text
        for first in range(0, len(whole), at_once):
            chosen = torch.tensor(whole[first : first + at_once], device=text.device) - length
            scores.append(self.flow.base.log_prob(windows[chosen]))
        rows = [row for score in scores for row in score]
        return torch.cat(
            [row[begin - end :] for row, begin, end in zip(rows, begins, ends, strict=True)]
        )
