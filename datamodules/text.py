"""Character text as windows of classes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.chunks import Array, Chunks, Cut, count
from datamodules.module import StreamDataModule
from datamodules.sources import KingJames, TextSource
from datamodules.splits import SPLITS
from datamodules.values import MemoryValues, Values, cached_counts, store_values
from datamodules.vocabulary import (
    ByteVocabulary,
    CharacterVocabulary,
    compact_dtype,
    load_vocabulary,
    unknown_symbol,
)
from datamodules.windows import (
    ConsecutiveWindows,
    ShuffledWindows,
    TrainingStream,
)
from dflows.errors import UserError
from dflows.metrics import entropy_in_bits
from dflows.reporting import Report, Score

__all__ = ["TextDataModule"]


class TextDataModule(StreamDataModule):
    """Creates windows of `length` characters of a text, as batches of classes.

    The text is read once, when it is first needed, and held at a byte a character (for up to 256
    symbols), in memory or in a file. Validation and test splits are cut into consecutive windows
    and every character is scored once; the rest that fills no window is a batch of its own, never
    padded.

    Args:
        source: Where the text comes from; by default the King James Bible, which needs no network.
        length: The number of characters of a window, D.
        batch_size: The windows of a training batch, in each process.
        eval_batch_size: The windows of an evaluation batch, in each process.
        vocabulary: `train`: the characters of the training split, sorted by code point. `corpus`:
            those of all splits. `bytes`: the 256 bytes of UTF-8, and "character" means byte
            throughout, the positions of splits included. Otherwise the path of a tokenizer.json or
            of the folder that it is in, or a list of characters in the order of their classes.
        unknown: Whether characters that the vocabulary has not share a class, which is decoded as
            U+FFFD. Otherwise they are an error. A tokenizer.json decides for itself.
        max_eval_characters: Validation and test score no more than the first so many characters of
            their splits. `characters` says how many are scored, `is_complete` whether that is all.
        stateful: Whether row i of a training batch begins where row i of the batch before ended,
            as a model needs that carries its state from window to window. The rows of a batch, over
            all processes, are then places of the text at equal distances.
        streaming: Whether to keep the classes of the text in a file and not in memory, for texts of
            any size; the batches are the same. The file is made at the first start, in the cache
            folder of the `datasets` library (HF_HOME), and found there by later ones.
        num_workers: The worker processes of each loader. In memory a batch takes some
            microseconds, so that the default of 0 is the quickest.
        seed: Every seed has a training stream of its own.

    Raises:
        UserError: If an argument is out of range. Reading the text raises it too: where it cannot
            be read, is empty, is shorter than a window or has a character that is unknown.

    Example:
        >>> data = TextDataModule(length=32, batch_size=4)
        >>> data.num_classes
        68
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.shape
        torch.Size([4, 32])
        >>> data.decode(batch[0])
        '...'
    """

    is_text = True

    def __init__(
        self,
        source: TextSource | None = None,
        length: int = 64,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        *,
        vocabulary: str | list[str] = "train",
        unknown: bool = False,
        max_eval_characters: int | None = None,
        stateful: bool = False,
        streaming: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(length, batch_size, eval_batch_size, num_workers, seed)
        if max_eval_characters is not None and max_eval_characters < 1:
            raise UserError(f"max_eval_characters must be at least 1, not {max_eval_characters}")
        self.source = KingJames() if source is None else source
        self._unknown = unknown
        self._max_eval_characters = max_eval_characters
        self.stateful = stateful
        self._streaming = streaming
        self._vocabulary = self._given_vocabulary(vocabulary)
        self._splits_of_vocabulary = SPLITS if vocabulary == "corpus" else SPLITS[:1]
        self._codes: dict[str, Chunks] = {}
        self._sizes: dict[str, int] = {}
        self._histograms: dict[tuple[str, int, int], NDArray[np.int64]] = {}
        self._classes: dict[str, Values] = {}

    @property
    def vocabulary(self) -> CharacterVocabulary | ByteVocabulary:
        """The map of characters and classes; built from the text when it is first asked for."""
        if self._vocabulary is None:
            counts = [self._histogram(split, limited=False) for split in self._splits_of_vocabulary]
            codes = sorted({int(code) for split in counts for code in split.nonzero()[0]})
            if len(codes) + self._unknown < 2:
                raise UserError(
                    f"{self._describe('train')} has no symbol but {chr(codes[0])!r}: "
                    "a vocabulary needs at least 2, give a text with more"
                )
            self._vocabulary = CharacterVocabulary(map(chr, codes), unknown=self._unknown)
        return self._vocabulary

    def setup(self, stage: str) -> None:
        """Reads the splits that a stage needs, for fitting the test split too.

        So a mistake in the last file shows before hours of training.

        Raises:
            UserError: If the text cannot be read, is empty, is shorter than a window or has an
                unknown character.
        """
        super().setup(stage)
        for split in {"validate": ["valid"], "test": ["test"]}.get(stage, SPLITS):
            self._load(split)

    def class_counts(self, split: str = "train") -> Tensor:
        """Returns how often each class occurs in the characters of a split that are used.

        Args:
            split: "train", "valid" or "test".

        Returns:
            A LongTensor of shape (K,) whose sum is `characters(split)`.
        """
        self._load(split)
        histogram = self._histogram(split)
        codes = histogram.nonzero()[0]
        counts = np.zeros(self.num_classes, np.int64)
        np.add.at(counts, self.vocabulary.lookup(codes), histogram[codes])
        return torch.from_numpy(counts)

    def characters(self, split: str = "train") -> int:
        """Returns how many characters of a split are used: trained on, or scored."""
        low, high = self._bounds(split)
        return high - low

    def is_complete(self, split: str) -> bool:
        """Returns whether all of a split is used: `max_eval_characters` cuts nothing off."""
        return self._bounds(split) == self._bounds(split, limited=False)

    def bigram_bpc(self, split: str) -> float:
        """Returns the entropy of a character given the one before, in bits, in a split."""
        classes = np.concatenate(list(self.evaluation_chunks(split))).astype(np.int64)
        # The pairs that occur, and no table of all: K² numbers are too many for many symbols.
        pairs = np.unique(classes[:-1] * self.num_classes + classes[1:], return_counts=True)[1]
        firsts = np.unique(classes[:-1], return_counts=True)[1]
        both, first = (
            float(entropy_in_bits(torch.from_numpy(counts).unsqueeze(0)))
            for counts in (pairs, firsts)
        )
        return both - first

    def report(self, score: Score) -> Report:
        report = super().report(score)
        if score.split == "test" and score.characters > 1:
            report.metrics["bigram_bpc"] = self.bigram_bpc(score.split)
        return report

    def report_samples(self, samples: list[str]) -> Report:
        return Report({"samples": samples})

    def training_stream(self) -> TrainingStream:
        """Returns the endless windows of the training split."""
        values = self._load("train")
        if self.stateful:
            streams = self.batch_size * self._process()[1]
            return ConsecutiveWindows(values, self.length, self.seed, streams)
        return ShuffledWindows(values, self.length, self.seed)

    def training_chunks(self) -> Chunks:
        """Returns the classes of the training split in their order."""
        return self._load("train")

    def evaluation_chunks(self, split: str) -> Chunks:
        """Returns the classes of a split in their order."""
        return self._load(split)

    def _given_vocabulary(
        self, vocabulary: str | list[str]
    ) -> CharacterVocabulary | ByteVocabulary | None:
        if not isinstance(vocabulary, str | Sequence):
            raise UserError(
                f"vocabulary is {vocabulary}: give train, corpus, bytes, a tokenizer.json or a "
                "list of characters"
            )
        if not isinstance(vocabulary, str):
            return CharacterVocabulary(vocabulary, unknown=self._unknown)
        if vocabulary in ("train", "corpus"):
            return None
        if vocabulary == "bytes":
            return ByteVocabulary()
        loaded = load_vocabulary(vocabulary)
        if not isinstance(loaded, CharacterVocabulary | ByteVocabulary):
            raise UserError(f"{vocabulary} is a vocabulary of integers, not of characters")
        return loaded

    def _load(self, split: str) -> Values:
        """Returns the classes of a split, reading all splits that share its stream at once."""
        if split not in self._classes:
            stream = self.source.locate(split)[0]
            for other in SPLITS:
                if self.source.locate(other)[0] == stream:
                    self._classes[other] = self._encoded(other)
            self._codes.pop(stream, None)
        return self._classes[split]

    def _encoded(self, split: str) -> Values:
        size = self.characters(split)
        if split == "train" and size < self.length:
            raise UserError(
                f"a window of length {self.length} is longer than the {size} characters of "
                f"{self._describe(split)}: set length to {size} or less, or give more text"
            )
        stream, (low, high) = self.source.locate(split)[0], self._bounds(split)
        codes = Cut(self._read(stream), low, high)
        self._refuse_unknown(split, codes)
        encoded = _Encoded(codes, self.vocabulary)
        dtype = compact_dtype(self.num_classes)
        if self._streaming:
            key = (self.source.fingerprint(stream), low, high, self.vocabulary.to_json())
            return store_values(encoded, dtype, *key)
        classes = np.empty(size, dtype)
        begin = 0
        for chunk in encoded:
            classes[begin : begin + len(chunk)] = chunk
            begin += len(chunk)
        return MemoryValues(classes)

    def _refuse_unknown(self, split: str, codes: Chunks) -> None:
        present = self._histogram(split).nonzero()[0]
        if self.vocabulary.first_unknown(present) is None:
            return
        offset = self._bounds(split)[0]
        for chunk in codes:
            unknown = self.vocabulary.first_unknown(chunk)
            if unknown is not None:
                place = self.source.place(self.source.locate(split)[0], offset + unknown)
                raise unknown_symbol(
                    chr(chunk[unknown]),
                    f"{place}, in the split {split}",
                    self.num_classes,
                    "set unknown: true, or vocabulary: corpus to give it a class, or remove it",
                )
            offset += len(chunk)

    def _describe(self, split: str) -> str:
        stream, low, high = self.source.locate(split)
        part = "" if high - low == 1 else f"the split {split} of "
        return part + self.source.describe(stream)

    def _bounds(self, split: str, *, limited: bool = True) -> tuple[int, int]:
        """Returns where in its stream a split begins and ends, in characters."""
        stream, low, high = self.source.locate(split)
        size = self._size(stream)
        begin, end = int(size * low), int(size * high)
        if begin == end:
            raise UserError(f"{self._describe(split)} is empty: give more text, or other fractions")
        if limited and split != "train" and self._max_eval_characters is not None:
            end = min(end, begin + self._max_eval_characters)
        return begin, end

    def _size(self, stream: str) -> int:
        if stream not in self._sizes:
            histogram = self._count(stream, None, None)
            self._sizes[stream] = size = int(histogram.sum())
            self._histograms[stream, 0, size] = histogram
        return self._sizes[stream]

    def _histogram(self, split: str, *, limited: bool = True) -> NDArray[np.int64]:
        """Returns how often each code point, or byte, occurs in a split."""
        stream = self.source.locate(split)[0]
        low, high = self._bounds(split, limited=limited)
        if (stream, low, high) not in self._histograms:
            self._histograms[stream, low, high] = self._count(stream, low, high)
        return self._histograms[stream, low, high]

    def _count(self, stream: str, low: int | None, high: int | None) -> NDArray[np.int64]:
        """Returns how often each code occurs in a part of a stream, or in all of it."""

        def counted() -> NDArray[np.int64]:
            codes = self._read(stream)
            return count(codes if low is None or high is None else Cut(codes, low, high))

        if not self._streaming:
            return counted()
        kind = type(self._vocabulary).__name__
        found: NDArray[np.int64] = cached_counts(
            counted, self.source.fingerprint(stream), low, high, kind
        )
        return found

    def _read(self, stream: str) -> Chunks:
        if stream not in self._codes:
            kind = type(self._vocabulary) if self._vocabulary else CharacterVocabulary
            codes = _Codes(self.source, stream, kind)
            self._codes[stream] = codes if self._streaming else list(codes)
        return self._codes[stream]


@dataclass(frozen=True)
class _Codes:
    """Creates the code points, or bytes, of a stream: the source is read at every iteration."""

    source: TextSource
    stream: str
    kind: type[CharacterVocabulary] | type[ByteVocabulary]

    def __iter__(self) -> Iterator[Array]:
        for block in self.source.blocks(self.stream):
            yield self.kind.codes(block)


@dataclass(frozen=True)
class _Encoded:
    """Creates the classes of code points or bytes."""

    codes: Chunks
    vocabulary: CharacterVocabulary | ByteVocabulary

    def __iter__(self) -> Iterator[Array]:
        for chunk in self.codes:
            yield self.vocabulary.lookup(chunk)
