"""Sizes that nothing could be made of are refused at once, with the number."""

import pytest

from dflows import flows, memory
from dflows.arguments import check_dimensions, check_layers
from dflows.backbones import LSTM, DilatedConvolution, LevelConvolution, Table, Transformer
from dflows.errors import UserError
from dflows.orderings import Strided
from lightning_modules import FlowModule

LANES = flows.language_model(3, 8, ordering=Strided(2))


def test_what_can_be_made_passes():
    check_layers(layers=10_000)
    assert check_dimensions(10**6) == 10**6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda many: LSTM(8, layers=many), "layers is 1,000,000,000: give at most 10,000"),
        (lambda many: Transformer(8, layers=many, heads=2), "layers is 1,000,000,000"),
        (lambda many: DilatedConvolution(8, layers=many), "layers is 1,000,000,000"),
        (lambda many: DilatedConvolution(8, kernel=many + 1), "kernel is 1,000,000,001"),
        (lambda many: LevelConvolution(8, window=many), "window is 1,000,000,000"),
        (lambda many: flows.bipartite(3, 4, num_transforms=many), "num_transforms is 1,0"),
        (lambda many: Table(8, 3, many), "a Table with length 1,000,000,000 takes at least 8,0"),
        (lambda many: Table(8, many, 3), "rows, more than 10,000,000"),
        (lambda many: flows.language_model(3, many), "an event with length 1,000,000,000 takes"),
        (lambda many: FlowModule(LANES).resize(length=many), "an event with length 1,000,000,000"),
        (lambda many: FlowModule(LANES).resize(passes=many), "1000000000 levels were asked for"),
        (lambda many: flows.bipartite(3, many), "an event with length 1,000,000,000 takes"),
    ],
)
def test_what_cannot_be_is_refused_at_once(make, message, monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda *_: 32 * 10**9)
    with pytest.raises(UserError, match=message):
        make(10**9)
