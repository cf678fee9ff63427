"""Lightning modules: the base one that users subclass, flows, and their opponents."""

from lightning_modules.auxiliary import Auxiliary
from lightning_modules.base import BaseModule, Batch, Optimization
from lightning_modules.flow import FlowModule
from lightning_modules.language_model import LanguageModel
from lightning_modules.latent_flow import LatentFlowModule
from lightning_modules.ngram import NGramModule
from lightning_modules.sharding import FullySharded

__all__ = [
    "Auxiliary",
    "BaseModule",
    "Batch",
    "FlowModule",
    "FullySharded",
    "LanguageModel",
    "LatentFlowModule",
    "NGramModule",
    "Optimization",
]
