"""A summary collects what the parts of a run report of themselves."""

import math
from contextlib import nullcontext

import pytest
import torch
from rich.console import Console
from torch import nn

from datamodules import FullRankDataModule, TextDataModule
from datamodules.sources import LocalText
from dflows.checks import CertificateError
from dflows.cli.callbacks import Stopwatch
from dflows.cli.summary import judge, print_report
from dflows.reporting import Report, Score


class Uniform(nn.Module):
    """A stand-in for a module: every state has the same likelihood, times a factor."""

    device = torch.device("cpu")
    likelihood = "exact"
    characters_read = None

    def __init__(self, states=1, factor=1, score=None):
        super().__init__()
        self.value = math.log(factor / states)
        self.scores = {} if score is None else {score.split: score}

    def log_prob(self, y):
        return torch.full(y.shape[:-1], self.value)

    def report(self, split):
        return Report({"characters": {split: self.scores[split].characters}}).row(split, "1.0")

    def report_structure(self):
        return Report({"passes": 3}).row("passes to generate", "3")


@pytest.fixture
def text(tmp_path):
    # Of six pairs, "a" is followed by "b", "b", "a" and "b" by "a", "a" and, once, "b".
    (tmp_path / "test.txt").write_text("ababbaa")
    source = LocalText(**dict.fromkeys(("train", "valid", "test"), str(tmp_path / "test.txt")))
    data = TextDataModule(source, length=4)
    data.setup("fit")
    return data


def test_bigrams_of_many_symbols_take_no_table_of_all(tmp_path):
    symbols = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    (tmp_path / "test.txt").write_text(symbols + symbols, encoding="utf-8")
    source = LocalText(**dict.fromkeys(("train", "valid", "test"), str(tmp_path / "test.txt")))
    data = TextDataModule(source, length=4)
    # All are known from the one before: 20,000² numbers would be 3 GB.
    assert data.bigram_bpc("test") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_text_reports_its_unigram_and_bigram_entropy(text, split):
    found = text.report(Score(split, bpc=1.0, characters=7, examples=2)).metrics
    unigram = -(4 / 7) * math.log2(4 / 7) - (3 / 7) * math.log2(3 / 7)
    bigram = -(2 / 3) * math.log2(2 / 3) - (1 / 3) * math.log2(1 / 3)
    if split == "valid":
        assert found == {"valid_unigram_bpc": pytest.approx(unigram)}
    else:
        assert found == {
            "unigram_bpc": pytest.approx(unigram),
            "bigram_bpc": pytest.approx(bigram),
        }


def test_samples_are_recorded_where_they_are_text(text):
    assert text.report_samples(["ab"]).metrics == {"samples": ["ab"]}
    assert not FullRankDataModule(length=3, num_classes=4).report_samples(["0 1 2"]).metrics


def test_an_expected_likelihood_below_the_entropy_is_refused():
    data = FullRankDataModule(length=3, num_classes=4)
    report = data.report_expected(Uniform(4**3), max_states=64)
    assert report.metrics["exact_nats"] == pytest.approx(3 * math.log(4))
    assert report.metrics["kl"] == pytest.approx(3 * math.log(4) - data.entropy)
    with pytest.raises(CertificateError, match="no likelihood"):
        data.report_expected(Uniform(4**3, factor=64), max_states=64)


def test_states_are_summed_over_where_there_are_not_too_many_and_no_bounds():
    data = FullRankDataModule(length=3, num_classes=4)
    assert set(data.report_expected(Uniform(), max_states=63).metrics) == {"factorized_entropy"}
    bounded = Uniform()
    bounded.likelihood = "bound"
    assert set(data.report_expected(bounded, max_states=64).metrics) == {"factorized_entropy"}


@pytest.mark.parametrize(
    ("below", "examples", "standard_error", "refused"),
    [(0.3, 1000, 0.05, True), (0.1, 1000, 0.05, False), (0.3, 1, 0.0, False)],
)
def test_a_split_is_not_scored_below_the_entropy(below, examples, standard_error, refused):
    data = FullRankDataModule(length=3, num_classes=4, eval_examples=1000)
    bpc = (data.entropy - below) / math.log(2) / data.length
    score = Score("test", bpc, examples * data.length, examples, standard_error)
    with pytest.raises(CertificateError, match="is below") if refused else nullcontext():
        data.report(score)


def test_all_parts_are_collected_in_one_table(text):
    score = Score("test", bpc=1.0, characters=7, examples=2)
    report = judge(Uniform(score=score), text, ["test"], Stopwatch())
    assert set(report.metrics) == {"characters", "unigram_bpc", "bigram_bpc", "passes"}
    assert [row.what for row in report.rows] == [
        "test",
        "test, unigram entropy",
        "passes to generate",
    ]
    console = Console(width=100, record=True)
    print_report(report, console, "a run")
    printed = console.export_text()
    assert "a run" in printed
    assert all(row.what in printed for row in report.rows)


def test_data_that_report_nothing_add_nothing():
    score = Score("test", bpc=1.0, characters=7, examples=2)
    report = judge(Uniform(score=score), None, ["test"], Stopwatch())
    assert report.metrics == {"characters": {"test": 7}, "passes": 3}


def test_speed_is_that_of_the_clock():
    clock = Stopwatch()
    clock.train_seconds, clock.train_characters, clock.train_examples = 2.0, 100, 10
    clock.test_seconds = 4.0
    report = clock.report(steps=5, tested=80)
    assert report.metrics == {
        "steps": 5,
        "train_seconds": 2.0,
        "characters_per_second": 50.0,
        "examples_per_second": 5.0,
    }
    assert [row.value for row in report.rows] == ["50", "20"]
    # What was read beside the batches, as where a model is counted, is what it learned from.
    assert clock.report(steps=5, read=300).metrics["characters_per_second"] == 150
