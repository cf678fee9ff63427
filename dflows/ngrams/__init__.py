"""Counted n-grams: the model itself, and the expert that adds what they know to logits."""

from dflows.ngrams.expert import NGramExpert
from dflows.ngrams.model import NGrams

__all__ = ["NGramExpert", "NGrams"]
