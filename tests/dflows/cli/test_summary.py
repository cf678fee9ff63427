"""The figures of a finished run are those of plain arithmetic."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from datamodules import FullRankDataModule, TextDataModule
from datamodules.sources import LocalText
from dflows.checks import CertificateError
from dflows.cli.summary import judge


class Uniform(nn.Module):
    """A stand-in for a module: every state has the same likelihood, times a factor."""

    device = torch.device("cpu")

    def __init__(self, states, factor):
        super().__init__()
        self.value = math.log(factor / states)

    def log_prob(self, y):
        return torch.full(y.shape[:-1], self.value)


def test_unigram_and_bigram_entropy(tmp_path):
    # Of six pairs, "a" is followed by "b", "b", "a" and "b" by "a", "a" and, once, "b".
    (tmp_path / "test.txt").write_text("ababbaa")
    source = LocalText(**dict.fromkeys(("train", "valid", "test"), str(tmp_path / "test.txt")))
    data = TextDataModule(source, length=4)
    data.setup("fit")
    assert unigram_bpc(data, "test") == pytest.approx(
        -(4 / 7) * math.log2(4 / 7) - (3 / 7) * math.log2(3 / 7)
    )
    assert bigram_bpc(data, "test") == pytest.approx(
        -(2 / 3) * math.log2(2 / 3) - (1 / 3) * math.log2(1 / 3)
    )


def test_a_likelihood_below_the_entropy_is_refused():
    data = FullRankDataModule(length=3, num_classes=4)
    assert exact_nats(Uniform(4**3, factor=1), data) == pytest.approx(3 * math.log(4))
    with pytest.raises(CertificateError, match="no likelihood"):
        exact_nats(Uniform(4**3, factor=64), data)


class Scored:
    """A stand-in for a module that has scored a split of so many examples."""

    likelihood = "exact"
    trainer = SimpleNamespace(callback_metrics={})

    def __init__(self, data, examples, standard_error):
        characters = examples * data.length
        self.counted = {"characters": {"test": characters}, "examples": {"test": examples}}
        self.standard_error = {"test": standard_error}


@pytest.mark.parametrize(
    ("below", "examples", "standard_error", "refused"),
    [(0.3, 1000, 0.05, True), (0.1, 1000, 0.05, False), (0.3, 1, 0.0, False)],
)
def test_a_split_is_not_scored_below_the_entropy(below, examples, standard_error, refused):
    data = FullRankDataModule(length=3, num_classes=4, eval_examples=1000)
    bpc = (data.entropy - below) / math.log(2) / data.length
    module = Scored(data, examples, standard_error)
    with pytest.raises(CertificateError, match="is below") if refused else nullcontext():
        Figures().add_likelihood(module, data, "test", bpc)
