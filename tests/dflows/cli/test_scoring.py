import math

import numpy as np
import pytest
import torch

from datamodules.vocabulary import ByteVocabulary, CharacterVocabulary, IntegerVocabulary
from dflows import Context, DiscreteFlow, flows
from dflows.backbones import LSTM
from dflows.bases import AutoregressiveBase, FactorizedBase, NGramBase
from dflows.cli.scoring import score
from dflows.errors import UserError
from dflows.orderings import Natural, Parity, Strided
from tests.dflows.small import make_conditioner, make_flow, shaken

VOCABULARY = CharacterVocabulary("abc\n")
TEXT = "abca\nbacabc\nccab\nabcabcabacbac\n\ncab"


def language_model(ordering, vocabulary=VOCABULARY, length=8, backbone=None):
    conditioner = make_conditioner(
        vocabulary.num_classes, length, ordering, backbone or LSTM(8, layers=1)
    )
    return shaken(DiscreteFlow(AutoregressiveBase(conditioner))).eval()


def window_bits(flow, text, vocabulary=VOCABULARY):
    """The bits of each window of a text."""
    classes = torch.from_numpy(vocabulary.encode(text).astype("int64"))
    with torch.no_grad():
        found = [-flow.log_prob(part).item() / math.log(2) for part in classes.split(flow.length)]
    return np.array(found)


FLOWS = {
    "lanes": lambda: language_model(Strided(4)),
    "left to right": lambda: language_model(Natural()),
    "masked": lambda: language_model(Strided(4), backbone="masked"),
    "a transform": lambda: make_flow(4, 8, [Natural()], "rank", "causal"),
    "two transforms": lambda: make_flow(4, 8, [Parity(), Natural()], "rank", "causal"),
    "n-grams": lambda: DiscreteFlow(NGramBase(4, 8, order=3)),
}


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_bits_of_characters_sum_to_those_of_windows(make):
    flow = make()
    scored = score(flow, VOCABULARY, TEXT.encode())
    assert len(scored.bits) == len(TEXT) == scored.scored
    sums = [scored.bits[start : start + 8].sum() for start in range(0, len(TEXT), 8)]
    assert np.allclose(sums, window_bits(flow, TEXT), rtol=1e-5)
    assert scored.total == pytest.approx(sum(sums))
    assert scored.exact_terms is (len(flow.transforms) == 0)


def test_it_says_when_a_character_is_drawn():
    scored = score(language_model(Strided(4)), VOCABULARY, TEXT.encode())
    assert scored.drawn.tolist() == [place % 8 % 4 + 1 for place in range(len(TEXT))]
    assert scored.passes == 4
    # The first level of a transform takes no pass.
    scored = score(FLOWS["a transform"](), VOCABULARY, TEXT.encode())
    assert scored.drawn.tolist() == [place % 8 for place in range(len(TEXT))]
    assert scored.passes == 7
    assert score(FLOWS["two transforms"](), VOCABULARY, TEXT.encode()).drawn is None
    assert score(FLOWS["n-grams"](), VOCABULARY, TEXT.encode()).drawn is None


@pytest.mark.parametrize("name", ["lanes", "left to right", "masked"])
def test_what_was_likelier_is_told_with_its_probability(name):
    flow = FLOWS[name]()
    scored = score(flow, VOCABULARY, TEXT.encode())
    y = torch.from_numpy(VOCABULARY.encode(TEXT[:8]).astype("int64")).unsqueeze(0)
    for place in range(8):
        own = 2 ** -scored.bits[place]
        others = {}
        for symbol in range(4):  # the conditional probability, by the chain rule over levels
            other = y.clone()
            other[0, place] = symbol
            with torch.no_grad():
                others[VOCABULARY.decode([symbol])] = (
                    flow.log_prob_terms(other)[0, place].exp().item()
                )
        expected = sorted(
            ((prob, sign) for sign, prob in others.items() if prob > own * (1 + 1e-5)), reverse=True
        )
        found = scored.likelier_at(place)
        assert [sign for sign, _ in found] == [sign for _, sign in expected]
        assert [prob for _, prob in found] == pytest.approx([prob for prob, _ in expected])
    assert score(FLOWS["a transform"](), VOCABULARY, b"abc").likelier_at(1) == []


@pytest.mark.parametrize("overlap", [1, 3, 7])
@pytest.mark.parametrize("length", [5, 8, 9, 30, 35])
def test_windows_that_overlap_score_each_character_once_given_those_before(overlap, length):
    flow, text = language_model(Natural()), TEXT[:length]
    scored = score(flow, VOCABULARY, text.encode(), overlap=overlap)
    classes = torch.from_numpy(VOCABULARY.encode(text).astype("int64"))
    step = 8 - overlap
    for place in range(length):
        start = 0 if place < 8 else (place - overlap) // step * step
        window = classes[start : start + 8]
        expected = -flow.log_prob_terms(window)[place - start].item() / math.log(2)
        assert scored.bits[place] == pytest.approx(expected, rel=1e-4)


def test_overlaps_that_would_not_be_exact_are_refused():
    with pytest.raises(UserError, match="first characters of a window depend on later ones"):
        score(language_model(Strided(4)), VOCABULARY, TEXT.encode(), overlap=2)
    with pytest.raises(UserError, match="overlap is 8: give 0 to below 8"):
        score(language_model(Natural()), VOCABULARY, TEXT.encode(), overlap=8)


def test_a_character_without_a_class_has_no_bits_and_moves_nothing_else():
    flow = language_model(Strided(4))
    plain = score(flow, VOCABULARY, TEXT.encode())
    other = score(flow, VOCABULARY, f"é{TEXT[:3]}𝒳{TEXT[3:]}".encode() + b"\xff")
    assert np.isnan(other.bits[[0, 4, -1]]).all()
    assert other.drawn[[0, 4, -1]].tolist() == [-1] * 3
    kept = ~np.isnan(other.bits)
    assert np.array_equal(other.bits[kept], plain.bits)
    assert other.scored == len(TEXT)
    assert other.total == pytest.approx(plain.total)
    places = np.flatnonzero(kept)
    for place, before in zip(places, range(len(TEXT)), strict=True):
        assert other.likelier_at(place) == plain.likelier_at(before)


def test_bytes_are_told_as_characters():
    flow = language_model(Natural(), ByteVocabulary(), 16)
    text = "aé𝒳b".encode() + b"\xff"
    scored = score(flow, ByteVocabulary(), text)
    assert scored.text == "aé𝒳b\udcff"
    classes = torch.tensor(list(text))
    terms = -flow.log_prob_terms(classes).numpy() / math.log(2)
    expected = [terms[:1], terms[1:3], terms[3:7], terms[7:8], terms[8:]]
    assert scored.bits == pytest.approx([part.sum() for part in expected], rel=1e-4)
    assert scored.drawn.tolist() == [1, 2, 4, 8, 9]
    assert scored.likelier_at(1) == []
    assert len(scored.likelier.classes) == scored.likelier.counts.sum()


def test_lines_and_places():
    scored = score(language_model(Natural()), VOCABULARY, b"abc\n\xffcab\n\na")
    lines = scored.lines()
    assert [scored.text[line.begin : line.end] for line in lines] == [
        "abc\n",
        "\udcffcab\n",
        "\n",
        "a",
    ]
    assert [line.number for line in lines] == [1, 2, 3, 4]
    assert [line.scored for line in lines] == [4, 4, 1, 1]
    assert sum(line.bits for line in lines) == pytest.approx(scored.total)
    assert lines[0].perplexity == pytest.approx(2 ** (lines[0].bits / 4))
    worst = scored.surprising_lines(2)
    assert worst[0].bits_per_character == max(line.bits_per_character for line in lines)
    places = scored.places(3)
    assert [place.bits for place in places] == sorted(scored.bits[~np.isnan(scored.bits)])[:-4:-1]
    for place in scored.places(99):
        line = scored.text.split("\n")[place.line - 1] + "\n"
        assert line[place.column - 1] == scored.text[place.index]
    assert len(scored.places(99)) == scored.scored


@pytest.mark.parametrize("content", [b"", b"\xff", b"a"])
def test_short_texts(content):
    scored = score(language_model(Strided(4)), VOCABULARY, content)
    assert len(scored.bits) == len(content)
    assert scored.bits_per_character == pytest.approx(scored.total)
    assert len(scored.lines()) == len(content)


def test_what_has_no_text_is_refused():
    with pytest.raises(UserError, match="a text has characters or bytes"):
        score(make_flow(5, 4), IntegerVocabulary(5), b"1 2")
    network = lambda: LSTM(8, bidirectional=True)  # noqa: E731
    flow = flows.stack(4, 4, [Parity()], network, context=Context(2))
    with pytest.raises(UserError, match="the model is conditional"):
        score(flow, VOCABULARY, b"ab")


def test_a_character_of_no_probability_is_the_worst_place():
    flow = DiscreteFlow(FactorizedBase(4, 8))
    with torch.no_grad():
        flow.base.logits[:, 2] = -torch.inf
    scored = score(flow, VOCABULARY, b"abcab\xff")
    assert scored.bits[2] == math.inf
    assert scored.scored == 5
    assert scored.total == scored.perplexity == scored.lines()[0].perplexity == math.inf
    assert scored.places(1)[0].column == 3
    assert len(scored.places(9)) == 5


def area_under_curve(wrong, right):
    """The share of pairs in which the wrong one has more bits."""
    return np.mean(np.array(wrong)[:, None] > np.array(right))


def test_lines_of_another_text_stand_out():
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefgh"), 4)) for _ in range(30)]
    others = ["".join(generator.choice(list("abcdefgh"), 4)) for _ in range(30)]

    def lines(of, number):
        return [" ".join(generator.choice(of, 5)) + "\n" for _ in range(number)]

    vocabulary = CharacterVocabulary("abcdefgh \n")
    base = NGramBase(10, 64, order=4)
    base.count([vocabulary.encode("".join(lines(words, 300))).astype("int64")])
    mixed = [(line, False) for line in lines(words, 40)]
    mixed += [(line, True) for line in lines(others, 10)]
    generator.shuffle(mixed)
    text = "".join(line for line, _ in mixed)
    scored = score(DiscreteFlow(base), vocabulary, text.encode())
    bits = [line.bits_per_character for line in scored.lines()]
    swapped = [is_swapped for _, is_swapped in mixed]
    wrong = [one for one, is_swapped in zip(bits, swapped, strict=True) if is_swapped]
    right = [one for one, is_swapped in zip(bits, swapped, strict=True) if not is_swapped]
    assert area_under_curve(wrong, right) > 0.99
