"""The first opponent: an autoregressive language model."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dflows.bases import AutoregressiveBase
from dflows.conditioner import Conditioner
from dflows.errors import UserError
from dflows.experts import leave_one_out
from dflows.flow import DiscreteFlow
from lightning_modules.auxiliary import Auxiliary, AuxiliaryHeads
from lightning_modules.base import DEFAULT_OPTIMIZATION, Batch, Optimization
from lightning_modules.processes import share_of_process
from lightning_modules.text import Overlapping, Score, TextModule

__all__ = ["LanguageModel"]


class _Windows(NamedTuple):
    """Where training windows ended: the last characters (B,), and the backbone's state."""

    last: Tensor
    state: tuple[Tensor, ...]


class LanguageModel(TextModule):
    r"""Creates a module that trains an autoregressive base without a transform.

    Over the natural ordering it is a language model, drawn in D passes. `test_bpc` is that of
    independent windows. Over the natural ordering, and without a context, testing logs
    `test_bpc_stateful` too, where every character of the split is scored once, given more than its
    window: with a stateful backbone (an LSTM) all that comes before it, by the state that one
    window hands to the next; with any other the D - `overlap_stride` characters before it at least,
    by windows of length D that overlap, of which the last `overlap_stride` characters count.

    With `stateful` such a backbone is also trained so, by truncated back-propagation through time:
    windows continue where those of the step before ended, and the data must be stateful too. Every
    window is still scored as an independent event, from a state of zero.

    Args:
        flow: An autoregressive base alone, :func:`dflows.flows.language_model` say.
        optimization: Settings of the optimizer.
        stateful: Whether training hands the state of the backbone from window to window.
        restart: Probability that a window starts from an empty state nonetheless, so that the
            beginning of an event is learned too.
        overlap_stride: Characters of an overlapping window that count; half of them where it is not
            given. Fewer see more, and cost more evaluations.
        auxiliary: Losses that are added to the objective; none where they are not given.

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
        >>> from dflows import flows
        >>> LanguageModel(flows.language_model(num_classes=27, length=16)).passes
        16
    """

    def __init__(
        self,
        flow: DiscreteFlow,
        optimization: Optimization = DEFAULT_OPTIMIZATION,
        stateful: bool = False,
        restart: float = 0.05,
        overlap_stride: int | None = None,
        auxiliary: Auxiliary | None = None,
    ) -> None:
        super().__init__(flow, optimization)
        if flow.base.any_order:
            raise UserError(
                "a LanguageModel trains one ordering, and the flow serves all: train it with "
                "FlowModule"
            )
        if len(flow.transforms) or flow.base.ordering is None:
            raise UserError(
                f"a LanguageModel is an autoregressive base alone, and the flow has a "
                f"{type(flow.base).__name__} and {len(flow.transforms)} transforms: give "
                "dflows.flows.language_model, or train it with FlowModule"
            )
        self.stateful = stateful
        self.restart = restart
        self.overlap_stride = (flow.length + 1) // 2 if overlap_stride is None else overlap_stride
        self.auxiliary = None if auxiliary is None else self._auxiliary_heads(auxiliary)
        self._check_stateful()
        self._windows: _Windows | None = None
        self._gathered: list[Tensor] | None = None

    @property
    def conditioner(self) -> Conditioner:
        """The network, from the characters before a place to the logits of that place."""
        return cast("AutoregressiveBase", self.flow.base).conditioner

    def _check_stateful(self) -> None:
        """Refuses stateful settings that do not fit."""
        length = self.flow.length
        if not 1 <= self.overlap_stride <= length:
            raise UserError(
                f"overlap_stride is {self.overlap_stride}: give a number from 1 to {length}, the "
                "length of a window"
            )
        if not 0 <= self.restart <= 1:
            raise UserError(f"restart is {self.restart}: give a probability from 0 to 1")
        if not self.stateful:
            return
        if not self.conditioner.stateful:
            raise UserError(
                f"stateful is set, and a {type(self.conditioner.backbone).__name__} over "
                f"{self.conditioner.ordering!r} carries no state: choose an LSTM over "
                "Natural without a context, or unset stateful"
            )
        if self.auxiliary is not None:
            raise UserError(
                "auxiliary losses need independent windows: unset stateful or auxiliary"
            )

    def _auxiliary_heads(self, settings: Auxiliary) -> AuxiliaryHeads:
        conditioner = self.conditioner
        backbone = conditioner.backbone
        if not (
            conditioner.one_pass and conditioner.embedding.embeds and conditioner.left_to_right
        ):
            raise UserError(
                "auxiliary losses need a level-causal backbone over Natural, without a context: "
                f"a {type(backbone).__name__} over {conditioner.ordering!r} is none"
            )
        layers = backbone.num_layers
        if settings.layers and layers == 1:
            raise UserError(
                "auxiliary.layers is set, and the network has no layer before its last that could "
                "be looked at: choose a Transformer of several, or set it to false"
            )
        return AuxiliaryHeads(self.flow.num_classes, conditioner.width, layers, settings)

    def prepare(self) -> None:
        self._windows = self._gathered = None
        if self.stateful and not self.data.stateful:
            raise UserError(
                "stateful is set, and the windows of the data do not continue each other: set "
                "stateful of a TextDataModule, or unset that of the model"
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

    def evaluate_objective(self, batch: Batch) -> Tensor:
        y = self.indices_of(batch)
        if self.stateful:
            return AutoregressiveBase.score(self._stateful_logits(y), y).sum(dim=-1)
        if self.auxiliary is None:
            return super().evaluate_objective(batch)
        with leave_one_out():
            logits, features = self.conditioner.layer_logits(y)
        added: Tensor = self.auxiliary(features, y, self._done or 0.0)
        # The value stays the log-likelihood; what is added is in the gradient alone.
        return AutoregressiveBase.score(logits, y).sum(dim=-1) + added - added.detach()

    def _stateful_logits(self, y: Tensor) -> Tensor:
        """Computes the logits (B, D, K) of consecutive training windows, and keeps the state."""
        last, state = y.new_full((len(y),), -1), None
        if self._windows is not None and len(self._windows.last) == len(y):
            last = self._windows.last.to(self.device)
            state = tuple(part.to(self.device) for part in self._windows.state)
            starts = torch.rand(len(y), device=y.device) < self.restart
            last = last.masked_fill(starts, -1)
        logits, state = self.conditioner.resume(y, last, state)
        self._windows = _Windows(y[:, -1], tuple(part.detach() for part in state))
        # Here, where all processes come by: the one that writes a checkpoint cannot ask the others.
        alone = self._trainer is None or self.trainer.world_size == 1
        self._gathered = [
            part.unsqueeze(0) if alone else cast("Tensor", self.all_gather(part))
            for part in (self._windows.last, *self._windows.state)
        ]
        return logits

    def training_state(self) -> dict[str, Any]:
        return {**super().training_state(), "states": self._gathered}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what :meth:`on_save_checkpoint` added."""
        super().on_load_checkpoint(checkpoint)
        gathered = checkpoint.get("training", {}).get("states")
        ranks = 1 if self._trainer is None else self.trainer.world_size
        if gathered is not None:
            dims = -1, *(-2 for _ in gathered[1:])
            self._gathered = [
                share_of_process(part, dim, ranks) for part, dim in zip(gathered, dims, strict=True)
            ]
            last, *state = (part[self.global_rank] for part in self._gathered)
            self._windows = _Windows(last, tuple(state))

    def text_score(self) -> Score | None:
        if self.conditioner.stateful:
            return self._score_by_state()
        if self.conditioner.left_to_right:
            return Overlapping(self._score_by_overlap, self.flow.length - self.overlap_stride)
        return None

    def _score_by_state(self) -> Score:
        """Returns what scores a text window by window, each from the state of the one before."""
        last, state = torch.full((1,), -1, device=self.device), None

        def score(text: Tensor) -> Tensor:
            nonlocal last, state
            found = []
            for window in text.split(self.flow.length):
                logits, state = self.conditioner.resume(window.unsqueeze(0), last, state)
                found.append(AutoregressiveBase.score(logits[0], window))
                last = window[-1:]
            return torch.cat(found)

        return score

    def _score_by_overlap(self, text: Tensor, known: int) -> Tensor:
        """Scores the characters (n,) of a text that come after those known, n of whole windows."""
        length, stride = self.flow.length, self.overlap_stride
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
