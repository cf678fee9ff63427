"""The tables of all orders in one: the same probabilities, faster."""

import pytest
import torch

from dflows.ngrams import NGrams
from tests.dflows.small import markov


@pytest.mark.parametrize(
    ("num_classes", "order"), [(3, 1), (3, 2), (5, 4), (2, 63), (2, 64), (256, 8)]
)
@pytest.mark.parametrize("size", [0, 3, 400])
def test_it_finds_what_the_tables_of_every_order_say(num_classes, order, size):
    ngrams, text = NGrams(num_classes, order), markov(400, num_classes)
    if num_classes == 256:
        text = text.flip(0) | 0x80  # so that the highest of 64 bits is in use
    if size:
        ngrams.count([text[:size]])
    history = ngrams.pack(text[None])[0]
    for seen in (torch.arange(len(text)) % (order + 2), torch.arange(len(text))):
        found = ngrams.lookup().next_probs(history, seen.minimum(torch.arange(len(text))))
        expected = ngrams.next_probs(history, seen.minimum(torch.arange(len(text))))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_it_follows_the_counts():
    ngrams = NGrams(3, 2)
    history, seen = torch.tensor([0, 1]), torch.tensor([1, 0])
    assert (ngrams.lookup().next_probs(history, seen) == 1 / 3).all()
    for text in ([0, 1, 2, 2], [2, 0, 2, 1]):
        ngrams.count([torch.tensor(text)])
        expected = ngrams.next_probs(history, seen)
        torch.testing.assert_close(ngrams.lookup().next_probs(history, seen), expected)
    other = NGrams(3, 2)
    other.lookup()
    other.load_state_dict(ngrams.state_dict())
    torch.testing.assert_close(other.lookup().next_probs(history, seen), expected)
