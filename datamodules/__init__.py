"""Lightning datamodules: windows of character text, and synthetic data that is known exactly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.addition import AdditionDataModule
    from datamodules.enumerable import EnumerableDataModule
    from datamodules.full_rank import FullRankDataModule
    from datamodules.mixture import MixtureDataModule
    from datamodules.module import StreamDataModule
    from datamodules.potts import PottsDataModule
    from datamodules.sources import HubText, KingJames, LocalText, TextSource
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
    "StreamDataModule",
    "TextDataModule",
    "TextSource",
    "Vocabulary",
    "load_vocabulary",
]

_MODULES = {
    "AdditionDataModule": "addition",
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
