"""Lightning datamodules: windows of text, rows of arrays, and data that is known exactly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.addition import AdditionDataModule
    from datamodules.array import ArrayDataModule
    from datamodules.enumerable import EnumerableDataModule
    from datamodules.full_rank import FullRankDataModule
    from datamodules.mixture import MixtureDataModule
    from datamodules.module import StreamDataModule
    from datamodules.potts import PottsDataModule
    from datamodules.sources import HubText, KingJames, LocalText, TextSource
    from datamodules.splits import Splits
    from datamodules.text import TextDataModule
    from datamodules.vocabulary import (
        ByteVocabulary,
        CharacterVocabulary,
        IntegerVocabulary,
        Vocabulary,
        load_vocabulary,
    )

__all__ = [
    "AdditionDataModule",
    "ArrayDataModule",
    "ByteVocabulary",
    "CharacterVocabulary",
    "EnumerableDataModule",
    "FullRankDataModule",
    "HubText",
    "IntegerVocabulary",
    "KingJames",
    "LocalText",
    "MixtureDataModule",
    "PottsDataModule",
    "Splits",
    "StreamDataModule",
    "TextDataModule",
    "TextSource",
    "Vocabulary",
    "load_vocabulary",
]

_MODULES = {
    "AdditionDataModule": "addition",
    "ArrayDataModule": "array",
    "ByteVocabulary": "vocabulary",
    "CharacterVocabulary": "vocabulary",
    "EnumerableDataModule": "enumerable",
    "FullRankDataModule": "full_rank",
    "HubText": "sources",
    "IntegerVocabulary": "vocabulary",
    "KingJames": "sources",
    "LocalText": "sources",
    "MixtureDataModule": "mixture",
    "PottsDataModule": "potts",
    "Splits": "splits",
    "StreamDataModule": "module",
    "TextDataModule": "text",
    "TextSource": "sources",
    "Vocabulary": "vocabulary",
    "load_vocabulary": "vocabulary",
}


def __getattr__(name: str) -> Any:
    # Lightning, datasets and tokenizers take seconds to import: each is when it is needed.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
