"""Vocabularies: which class every symbol of a text is, held by Hugging Face tokenizers.

The tokenizer is the definition, and saved next to a checkpoint. Look-up tables compute the
same map about a thousand times quicker, and are what reads corpora.
"""

import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from datamodules.symbols import ByteSymbols, CharacterSymbols
from dflows.errors import UserError
from dflows.files import make_folder, write_text
from dflows.memory import check_memory

__all__ = [
    "ByteVocabulary",
    "CharacterVocabulary",
    "IntegerVocabulary",
    "Vocabulary",
    "load_vocabulary",
]

FILE_NAME = "tokenizer.json"
UNKNOWN = "\ufffd"  # the replacement character


def compact_dtype(num_classes: int) -> type[np.integer]:
    """Returns the smallest type that holds the classes."""
    if num_classes <= 1 << 8:
        return np.uint8
    return np.uint16 if num_classes <= 1 << 16 else np.int32


class Vocabulary(ABC):
    """A one-to-one map of K symbols and the classes 0..K-1.

    Args:
        symbols: The symbols in the order of their classes.
        tokenizer: The tokenizer that defines the map.
    """

    unknown: int | None = None
    """The class of all symbols that have none of their own, or None where those are errors."""

    is_text = True
    """Whether symbols one after the other are a text, of any length."""

    def __init__(self, symbols: Sequence[str], tokenizer: Tokenizer) -> None:
        self.symbols = tuple(symbols)
        self.tokenizer = tokenizer

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return len(self.symbols)

    @abstractmethod
    def encode(self, text: str, source: str = "the text") -> NDArray[np.integer]:
        """Returns the classes of a text's symbols, in the smallest type that holds them.

        Args:
            text: The text.
            source: What an error calls the text.

        Raises:
            UserError: If a symbol is unknown; the message names it and its place.
        """

    @abstractmethod
    def _join(self, indices: list[int]) -> str: ...

    def decode(self, indices: Iterable[int]) -> str:
        """Returns the text of classes: integers, an array or a tensor, of one dimension.

        Raises:
            UserError: If a class is not in 0..K-1.
        """
        classes = [operator.index(index) for index in indices]
        for index in classes:
            if not 0 <= index < self.num_classes:
                raise UserError(
                    f"class {index} stands for no symbol: "
                    f"the vocabulary has the classes 0 to {self.num_classes - 1}"
                )
        return self._join(classes)

    def text_symbols(self) -> ByteSymbols | CharacterSymbols:
        """Returns the symbols as any file is made of them.

        Raises:
            UserError: If they are no symbols of texts.
        """
        raise UserError(
            f"the classes stand for the symbols of {self!r}, and a text has characters or bytes: "
            "use dflows.codec.compress(flow, indices) in Python"
        )

    def save(self, folder: str | Path) -> Path:
        """Writes tokenizer.json into a folder, whole or not at all, and returns its path.

        Raises:
            UserError: If it cannot be written.
        """
        folder = Path(folder)
        make_folder(folder)
        path = folder / FILE_NAME
        write_text(path, self.to_json())
        return path

    def to_json(self) -> str:
        """Returns the text of tokenizer.json."""
        return str(self.tokenizer.to_str(pretty=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_classes={self.num_classes})"

    def _identity(self) -> tuple[Any, ...]:
        return type(self), self.symbols, self.unknown


class CharacterVocabulary(Vocabulary):
    r"""Creates a vocabulary of characters, that is, Unicode code points.

    The tokenizer is byte-pair encoding without a single merge. Nothing is normalised: a combining
    accent is a symbol of its own, and so are "\r", "\n", "\u2028" and "\0".

    Args:
        characters: The symbols in the order of their classes, a string or characters.
        unknown: Whether there is a class for all other characters. It is the class of U+FFFD, the
            replacement character, which is appended where it is not among the symbols yet, and it
            decodes to that. Without it, encoding an unknown character is an error.

    Raises:
        UserError: If there are fewer than two symbols, a symbol is not one character or stands
            twice.

    Example:
        >>> vocabulary = CharacterVocabulary("abc")
        >>> vocabulary.encode("cab")
        array([2, 0, 1], dtype=uint8)
        >>> vocabulary.decode([2, 0, 1])
        'cab'
        >>> vocabulary.encode("abd", source="my.txt")
        Traceback (most recent call last):
            ...
        dflows.errors.UserError: my.txt, line 1, column 3: 'd' (U+0064) is not among ...
    """

    def __init__(self, characters: Iterable[str], *, unknown: bool = False) -> None:
        symbols = list(characters)
        for symbol in symbols:
            if len(symbol) != 1:
                raise UserError(f"a vocabulary's symbols are single characters, not {symbol!r}")
            if "\ud800" <= symbol <= "\udfff":
                raise UserError(f"half a surrogate pair, {symbol!r}, is no character")
        if len(set(symbols)) < len(symbols):
            twice = next(symbol for symbol in symbols if symbols.count(symbol) > 1)
            raise UserError(f"the symbol {twice!r} stands twice among the vocabulary's characters")
        if unknown and UNKNOWN not in symbols:
            symbols.append(UNKNOWN)
        if len(symbols) < 2:
            raise UserError(
                f"a vocabulary needs at least 2 symbols, and this one has {len(symbols)}: "
                "give a text or characters with more"
            )
        tokenizer = Tokenizer(
            models.BPE(
                vocab={symbol: index for index, symbol in enumerate(symbols)},
                merges=[],
                unk_token=UNKNOWN if unknown else None,
            )
        )
        tokenizer.decoder = decoders.Fuse()
        super().__init__(symbols, tokenizer)
        self.unknown = symbols.index(UNKNOWN) if unknown else None
        self._dtype = compact_dtype(len(symbols))
        codes = np.array([ord(symbol) for symbol in symbols])
        # One entry more than the largest code point: what every larger one is looked up as.
        self._table = np.full(codes.max() + 2, -1 if self.unknown is None else self.unknown)
        self._table[codes] = np.arange(len(symbols))

    @staticmethod
    def codes(text: str) -> NDArray[np.unsignedinteger]:
        """Returns the text's code points, in a type no larger than they need.

        Raises:
            UserError: If the text has half a surrogate pair, which no file of text can hold.
        """
        if text.isascii():
            return np.frombuffer(text.encode("ascii"), np.uint8)
        try:
            codes = np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4"))
        except UnicodeEncodeError as error:
            raise UserError(
                f"character {error.start + 1} of the text, {text[error.start]!r}, "
                "is half a surrogate pair and no character: remove it"
            ) from None
        return codes.astype(np.uint16) if codes.max() < 1 << 16 else codes

    def first_unknown(self, codes: NDArray[np.integer]) -> int | None:
        """Returns where the first code point stands that has no class, or None."""
        unknown = self._look_up(codes) < 0
        return int(unknown.argmax()) if unknown.any() else None

    def lookup(self, codes: NDArray[np.integer]) -> NDArray[np.integer]:
        """Returns the classes of code points, all of which must have one."""
        return self._look_up(codes).astype(self._dtype)

    def _look_up(self, codes: NDArray[np.integer]) -> NDArray[np.integer]:
        return self._table.take(codes, mode="clip")

    def encode(self, text: str, source: str = "the text") -> NDArray[np.integer]:
        """Returns the classes of a text's characters; see the base class."""
        codes = self.codes(text)
        if (offset := self.first_unknown(codes)) is not None:
            line = text.count("\n", 0, offset) + 1
            column = offset - text.rfind("\n", 0, offset)
            place = f"{source}, line {line}, column {column}"
            raise unknown_symbol(text[offset], place, self.num_classes, "remove it")
        return self.lookup(codes)

    def text_symbols(self) -> CharacterSymbols:
        """Returns the symbols; see the base class."""
        return CharacterSymbols(self.symbols, self.unknown, self._look_up)

    def _join(self, indices: list[int]) -> str:
        return "".join([self.symbols[index] for index in indices])


class ByteVocabulary(Vocabulary):
    """Creates the vocabulary of the 256 bytes: a text's symbols are the bytes of its UTF-8.

    Nothing is ever unknown to it. Bytes that are no UTF-8 decode to U+FFFD.

    Example:
        >>> ByteVocabulary().encode("é")
        array([195, 169], dtype=uint8)
    """

    def __init__(self) -> None:
        symbols = _byte_symbols()
        tokenizer = Tokenizer(
            models.BPE(vocab={symbol: byte for byte, symbol in enumerate(symbols)}, merges=[])
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        super().__init__(symbols, tokenizer)

    @staticmethod
    def codes(text: str) -> NDArray[np.unsignedinteger]:
        """Returns the bytes of the text's UTF-8.

        Raises:
            UserError: If the text has half a surrogate pair, which UTF-8 cannot hold.
        """
        try:
            return np.frombuffer(text.encode("utf-8"), np.uint8)
        except UnicodeEncodeError:
            return CharacterVocabulary.codes(text)  # which raises the error that says where

    def first_unknown(self, codes: NDArray[np.integer]) -> None:
        """Returns None: every byte has a class."""

    def lookup(self, codes: NDArray[np.integer]) -> NDArray[np.integer]:
        """Returns the classes of bytes, which are their values."""
        return codes

    def encode(self, text: str, source: str = "the text") -> NDArray[np.integer]:
        """Returns the classes of a text's bytes; see the base class."""
        return self.codes(text)

    def text_symbols(self) -> ByteSymbols:
        """Returns the symbols; see the base class."""
        return ByteSymbols()

    def _join(self, indices: list[int]) -> str:
        return bytes(indices).decode("utf-8", errors="replace")


class IntegerVocabulary(Vocabulary):
    """Creates the vocabulary of the integers 0..K-1, written in decimal and separated by spaces.

    Args:
        num_classes: The number of classes, K, at least 2.

    Raises:
        UserError: If K is less than 2.

    Example:
        >>> IntegerVocabulary(5).decode([3, 0, 4])
        '3 0 4'
    """

    is_text = False

    def __init__(self, num_classes: int) -> None:
        if num_classes < 2:
            raise UserError(f"num_classes must be at least 2, not {num_classes}")
        # A symbol is a text, known by two tables.
        what = f"a vocabulary of {num_classes:,} symbols"
        check_memory(200 * num_classes, what, "give a smaller num_classes")
        symbols = [str(index) for index in range(num_classes)]
        tokenizer = Tokenizer(
            models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}, "<unk>")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        super().__init__(symbols, tokenizer)

    def encode(self, text: str, source: str = "the text") -> NDArray[np.integer]:
        """Returns the integers that a text lists; see the base class."""
        classes = {symbol: index for index, symbol in enumerate(self.symbols)}
        words = text.split()
        for number, word in enumerate(words, 1):
            if word not in classes:
                raise UserError(
                    f"{source}, word {number}: {word!r} is not an integer "
                    f"from 0 to {self.num_classes - 1}"
                )
        return np.array([classes[word] for word in words], compact_dtype(self.num_classes))

    def _join(self, indices: list[int]) -> str:
        return " ".join([self.symbols[index] for index in indices])


def load_vocabulary(path: str | Path) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.json, or of the one in a folder.

    Args:
        path: The file or folder.

    Raises:
        UserError: If there is no such file, it is damaged, or it is a tokenizer of another kind.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path /= FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no tokenizer.json: it is not text in UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read the vocabulary {path}: {error.strerror}") from None
    return parse_vocabulary(text, str(path))


def parse_vocabulary(text: str, source: str = "the vocabulary") -> Vocabulary:
    """Returns the vocabulary that is written in the text of a tokenizer.json.

    Args:
        text: What `Vocabulary.to_json` returns.
        source: What an error calls it.

    Raises:
        UserError: If the text is damaged, or describes a tokenizer of another kind.
    """
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is damaged or no tokenizer.json: {error}") from None
    foreign = UserError(
        f"{source} is not one that dflows wrote: give the tokenizer.json of a checkpoint, "
        "or let the vocabulary be built from the text"
    )
    try:
        model = described["model"]
        classes = model["vocab"]
        symbols = sorted(classes, key=classes.get)
        vocabulary: Vocabulary
        if model["type"] == "WordLevel":
            vocabulary = IntegerVocabulary(len(symbols))
        elif (described["pre_tokenizer"] or {}).get("type") == "ByteLevel":
            vocabulary = ByteVocabulary()
        else:
            vocabulary = CharacterVocabulary(symbols, unknown=model["unk_token"] is not None)
        # Written again, it must say the same: no merge, normaliser or added token is passed over.
        written = json.loads(vocabulary.to_json())
        parts = ("added_tokens", "normalizer", "pre_tokenizer", "decoder")
        same = all(described[part] == written[part] for part in parts) and all(
            model[part] == written["model"][part] for part in ("type", "vocab", "unk_token")
        )
    except (LookupError, TypeError, AttributeError, UserError):
        raise foreign from None
    if not same or model.get("merges"):
        raise foreign
    return vocabulary


def unknown_symbol(symbol: str, place: str, num_classes: int, fix: str) -> UserError:
    """Returns the error that says which symbol is unknown, where it stands and what to do."""
    return UserError(
        f"{place}: {symbol!r} (U+{ord(symbol):04X}) is not among the {num_classes} symbols "
        f"of the vocabulary: {fix}"
    )


def _byte_symbols() -> list[str]:
    """Returns how the tokenizers library writes each byte: the printable ones as themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)
    ]
