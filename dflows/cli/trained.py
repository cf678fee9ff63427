"""A trained model in Python: its module, its vocabulary, samples and scores."""

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.vocabulary import Vocabulary
from dflows.bases import Base
from dflows.cli.checkpoints import load_model, read_checkpoint
from dflows.cli.models import exact_flow
from dflows.cli.scoring import Scored, score
from dflows.codec import TextCodec
from dflows.codec.archive import ArchiveReader
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.memory import check_memory
from lightning_modules import BaseModule
from lightning_modules.base import Method

__all__ = ["TrainedModel", "draw", "load"]

AT_ONCE = 256


def draw(
    module: BaseModule,
    num_samples: int,
    length: int,
    window: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    method: Method = "levels",
    prompt: Tensor | None = None,
    draft: Base | None = None,
    drawn: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draws samples of any length.

    Args:
        module: The model.
        num_samples: How many, N.
        length: Dimensions of each, L.
        window: The largest number of dimensions that the model draws together.
        temperature: Divides the base's logits.
        seed: Seed of all randomness.
        method: `levels`, or `fixed_point`, which gives the same samples.
        prompt: Indices (n,) that every sample begins with; at most a window.
        draft: Guesses samples, as in :meth:`dflows.DiscreteFlow.sample`.
        drawn: Told after every batch how many windows are drawn, and how many will be.

    Returns:
        Indices (N, L): independent windows, one after the other.

    Raises:
        UserError: If the prompt or the draft does not fit, or the model takes none; or the samples
            do not fit in memory.
    """
    # Indices take 8 bytes, as parts and as a whole; what is drawn together has noise and levels.
    together = min(num_samples * -(-length // window), AT_ONCE) * min(window, length)
    check_memory(
        16 * num_samples * length + 24 * together,
        f"{num_samples:,} samples of {length:,} dimensions",
        "give fewer, or shorter ones",
    )
    generator = torch.Generator(module.device).manual_seed(seed)
    total, done = num_samples * -(-length // window), 0
    if prompt is not None:
        _check_prompt(module, len(prompt), length, window)

    drafted: dict[str, Any] = {} if draft is None else {"draft": draft}
    if draft is not None and not module.takes_draft:
        raise UserError(
            f"a draft was given, and a {type(module).__name__} takes none: leave it away"
        )

    def windows(number: int, size: int, **options: Any) -> Tensor:
        nonlocal done
        parts = []
        for begin in range(0, number, AT_ONCE):
            part = module.sample(
                min(AT_ONCE, number - begin),
                length=size,
                temperature=temperature,
                generator=generator,
                method=method,
                **drafted,
                **options,
            )
            parts.append(part)
            done += len(part)
            if drawn is not None:
                drawn(done, total)
        return torch.cat(parts)

    parts = []
    if prompt is not None:
        first = min(window, length)
        parts.append(windows(num_samples, first, prompt=prompt))
        length -= first
    whole, rest = divmod(length, window)
    if whole:
        parts.append(windows(num_samples * whole, window).reshape(num_samples, whole * window))
    if rest:
        parts.append(windows(num_samples, rest))
    return torch.cat(parts, dim=1)


def _check_prompt(module: BaseModule, number: int, length: int, window: int) -> None:
    if not module.takes_prompt:
        raise UserError(
            f"a prompt was given, and a {type(module).__name__} takes none: leave it away"
        )
    if number > min(window, length):
        what = f"samples have {length}" if length < window else f"the model draws {window} at once"
        raise UserError(
            f"the prompt has {number} characters, and {what}: give a shorter prompt"
            + (", or a greater length" if length < window else "")
        )


@dataclass(frozen=True)
class TrainedModel:
    """Creates a model that a checkpoint holds; :func:`dflows.load` reads one.

    Args:
        module: The Lightning module, in evaluation mode.
        vocabulary: Classes and symbols.
        length: The largest number of dimensions that the model scores and draws together, D.
    """

    module: BaseModule
    vocabulary: Vocabulary
    length: int

    @property
    def flow(self) -> nn.Module:
        """The flow in the module.

        Raises:
            UserError: If it has none.
        """
        flow = getattr(self.module, "flow", None)
        if not isinstance(flow, nn.Module):
            raise UserError(f"a {type(self.module).__name__} has no flow: use module")
        return flow

    def draft_of(self, model: "TrainedModel") -> Base:
        """Returns the base of this model, which guesses the samples of another.

        Raises:
            UserError: If the two have other vocabularies, or this one is more than a base.
        """
        flow = getattr(self.module, "flow", None)
        if not isinstance(flow, DiscreteFlow) or len(flow.transforms):
            raise UserError(
                f"the draft is a {type(self.module).__name__}, and no base alone: give an "
                "NGramModule"
            )
        if self.vocabulary != model.vocabulary:
            raise UserError(
                f"the draft has another vocabulary of {self.vocabulary.num_classes} classes than "
                f"the model with its {model.vocabulary.num_classes}: give n-grams that were "
                "counted on the model's data"
            )
        return flow.base.to(model.module.device)

    def score(self, text: str | bytes, *, overlap: int = 0) -> Scored:
        """Scores every character of a text, as `python -m dflows.score` does.

        Args:
            text: The text, or its UTF-8. Characters without a class have no bits.
            overlap: Characters of each window that are known from the window before.

        Returns:
            The bits of the characters, the lines, and what the model held likelier.

        Raises:
            UserError: If the likelihood is no exact one, the model is conditional, or windows
                cannot overlap.
        """
        content = text.encode() if isinstance(text, str) else text
        return score(exact_flow(self.module), self.vocabulary, content, overlap=overlap)

    def compress(self, text: bytes, *, batch_size: int | None = None) -> bytes:
        """Encodes a text into an archive, as `python -m dflows.compress` does.

        Args:
            text: Any bytes; a file of text is UTF-8.
            batch_size: Windows that are encoded together, 65,536 symbols by default.

        Returns:
            The archive.

        Raises:
            UserError: If the likelihood is no exact one, or the model is conditional.
        """
        file = io.BytesIO()
        self._codec().compress(io.BytesIO(text), file, batch_size=batch_size)
        return file.getvalue()

    def decompress(self, archive: bytes) -> bytes:
        """Decodes a text that this model has encoded, in as many passes.

        Raises:
            ArchiveError: If it is damaged, or was written by another model, or where this one
                computes other numbers.
        """
        reader = ArchiveReader(io.BytesIO(archive))
        reader.check()
        return b"".join(self._codec().decompress(reader))

    def _codec(self) -> TextCodec:
        return TextCodec(exact_flow(self.module), self.vocabulary.text_symbols())

    def encode(self, text: str) -> Tensor:
        """Returns the classes (n,) of a text, on the device of the model."""
        classes = self.vocabulary.encode(text, "the text").astype("int64")
        return torch.from_numpy(classes).to(self.module.device)

    def decode(self, indices: Tensor) -> list[str]:
        """Returns the texts of classes (N, d)."""
        return [self.vocabulary.decode(row) for row in indices.cpu()]

    def sample(self, num_samples: int = 1, **options: Any) -> list[str]:
        """Generates texts.

        Args:
            num_samples: How many.
            options: As in :meth:`sample_indices`.
        """
        return self.decode(self.sample_indices(num_samples, **options))

    @torch.no_grad()
    def sample_indices(
        self,
        num_samples: int = 1,
        *,
        length: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        method: Method = "levels",
        prompt: str | None = None,
        context: Tensor | None = None,
        draft: "TrainedModel | None" = None,
    ) -> Tensor:
        """Generates events.

        Args:
            num_samples: How many, N.
            length: Dimensions of each, L; those of a window by default. A longer sample is made of
                independent windows.
            temperature: Divides the base's logits.
            seed: Seed of all randomness.
            method: `levels`, or `fixed_point`, which gives the same samples.
            prompt: What every sample begins with.
            context: What each is conditioned on (N, …), by a conditional model.
            draft: An n-gram model over the same vocabulary, which guesses samples for the method
                `fixed_point`: as in :meth:`dflows.DiscreteFlow.sample`.

        Returns:
            Indices (N, L).

        Raises:
            UserError: If the prompt cannot be honoured, or the context or the draft does not fit.
        """
        self._check_context(context)
        if context is not None:
            generator = torch.Generator(self.module.device).manual_seed(seed)
            given: dict[str, Any] = {} if prompt is None else {"prompt": self.encode(prompt)}
            if draft is not None:
                given["draft"] = draft.draft_of(self)
            return self.module.sample(
                num_samples,
                length=length,
                temperature=temperature,
                generator=generator,
                method=method,
                context=self._given(context),
                **given,
            )
        return draw(
            self.module,
            num_samples,
            length or self.length,
            self.length,
            temperature=temperature,
            seed=seed,
            method=method,
            prompt=None if prompt is None else self.encode(prompt),
            draft=None if draft is None else draft.draft_of(self),
        )

    @torch.no_grad()
    def log_prob(
        self, texts: str | Sequence[str] | Tensor, context: Tensor | None = None
    ) -> Tensor:
        """Computes the log-likelihoods of texts.

        A text longer than the model's window is scored in independent windows, as
        `python -m dflows.evaluate` does.

        Args:
            texts: One text, several, or classes (N, d).
            context: What each is conditioned on (N, …), by a conditional model.

        Returns:
            Log-likelihoods (N,) in nats, float64, on the CPU; bounds where the model has bounds.

        Raises:
            UserError: If a text has unknown symbols, or none, or the context does not fit.
        """
        self._check_context(context)
        rows = self._rows(texts)
        return torch.stack(
            [
                self._score(row, None if context is None else context[n])
                for n, row in enumerate(rows)
            ]
        )

    def bits_per_character(
        self, texts: str | Sequence[str] | Tensor, context: Tensor | None = None
    ) -> float:
        """Computes the bits per character of texts, all their characters together.

        Args:
            texts: As in :meth:`log_prob`.
            context: Likewise.
        """
        characters = sum(len(row) for row in self._rows(texts))
        return -float(self.log_prob(texts, context).sum()) / characters / math.log(2)

    def _rows(self, texts: str | Sequence[str] | Tensor) -> list[Tensor]:
        if isinstance(texts, Tensor):
            rows = list(torch.atleast_2d(texts).to(self.module.device))
        else:
            rows = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        if not rows or any(not len(row) for row in rows):
            raise UserError("there is nothing to score: give texts of at least one character")
        return rows

    def _score(self, row: Tensor, context: Tensor | None) -> Tensor:
        """Returns the log-likelihood of one event, or of the windows of one that is longer."""
        if context is not None:
            given = (row.unsqueeze(0), self._given(context.unsqueeze(0)))
            return self.module.log_prob(given)[0].double().cpu()
        total = torch.zeros((), dtype=torch.double)
        whole = len(row) // self.length * self.length
        for windows in row[:whole].reshape(-1, self.length).split(AT_ONCE):
            total += self.module.log_prob(windows).double().sum().cpu()
        if whole < len(row):
            total += self.module.log_prob(row[whole:].unsqueeze(0)).double().sum().cpu()
        return total

    def _given(self, context: Tensor) -> Tensor:
        """Returns a context on the device of the model and, if it is floating, in its precision."""
        of_weights = next((p.dtype for p in self.module.parameters()), torch.float32)
        dtype = of_weights if context.is_floating_point() else context.dtype
        return context.to(self.module.device, dtype)

    def _check_context(self, context: Tensor | None) -> None:
        if (context is not None) != self.module.conditional:
            kind = "conditional" if self.module.conditional else "not conditional"
            given = "no context was given" if context is None else "a context was given"
            remedy = "give context" if context is None else "leave context away"
            raise UserError(f"the model is {kind}, and {given}: {remedy}")


def load(
    path: str | os.PathLike[str],
    *,
    allow: Sequence[str] = (),
    device: torch.device | str = "cpu",
    passes: int | None = None,
    length: int | None = None,
) -> TrainedModel:
    """Loads what :func:`dflows.load` documents."""
    checkpoint = read_checkpoint(path)
    module = load_model(checkpoint, allow).to(device)
    module.resize(passes=passes, length=length)
    return TrainedModel(module, checkpoint.vocabulary, length or checkpoint.length)
