"""Values decided by n-grams, from left to right."""

import pytest
import torch

from dflows.categorical import inverse_cdf
from dflows.ngrams import NGrams, drafter
from tests.dflows.small import markov

CLASSES, LENGTH = 4, 9


def counted(order=3):
    ngrams = NGrams(CLASSES, order)
    ngrams.count([markov(300, CLASSES)])
    return ngrams


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_of_every_row_it_draws_what_is_due_from_what_stands_before(order, temperature):
    ngrams, noise = counted(order), torch.rand(20, LENGTH)
    values, due = torch.randint(CLASSES, (20, LENGTH)), torch.rand(20, LENGTH) < 0.5
    due[0], due[1] = False, True
    drawn = drafter(ngrams, noise, temperature)(values, due)
    expected = values.clone()
    for row, place in due.nonzero().tolist():
        history = ngrams.pack(expected)[row, place : place + 1]
        probs = ngrams.next_probs(history, place)
        expected[row, place] = inverse_cdf(
            noise[row, place : place + 1], probs=probs, temperature=temperature
        )
    assert torch.equal(drawn, expected)


def test_nothing_due_and_no_rows_are_nothing_to_do():
    values = torch.randint(CLASSES, (3, LENGTH))
    for rows in (values, values[:0]):
        due = torch.zeros_like(rows, dtype=torch.bool)
        assert torch.equal(drafter(counted(), torch.rand(rows.shape))(rows, due), rows)
