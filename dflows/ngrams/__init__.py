"""Counted n-grams: the model itself, and the expert that adds what they know to logits."""

from dflows.ngrams.chain import decide_left_to_right, drafter, draw_left_to_right
from dflows.ngrams.expert import NGramExpert
from dflows.ngrams.model import NGrams

__all__ = ["NGramExpert", "NGrams", "decide_left_to_right", "drafter", "draw_left_to_right"]
