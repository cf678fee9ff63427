"""What cannot fit is refused before it is begun."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from dflows import memory
from dflows.errors import UserError
from dflows.memory import bounded, check_memory, total_memory


def test_a_container_has_less(tmp_path, monkeypatch):
    whole = total_memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (limit, tmp_path / "none"))
    for text, expected in (("4096\n", 4096), ("max\n", None)):
        limit.write_text(text, encoding="ascii")
        assert total_memory() == (expected or max(whole, total_memory()))


@pytest.mark.parametrize("part", [0.01, 1.0])
def test_what_fits_is_no_error(part):
    check_memory(int(part * total_memory()), "a table", "give less")


def test_what_does_not_fit_is_refused_with_its_size():
    message = "a table takes at least 1,000,000 GB of memory, and there are .*: give less"
    with pytest.raises(UserError, match=message):
        check_memory(10**15, "a table", "give less")


class TestBounded:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.empty(10**12),
            lambda: torch.zeros(10**6, 10**6),
            lambda: torch.full((10**12,), 1.0, device="cpu"),
            lambda: torch.arange(10**12),
            lambda: torch.rand(10**12, generator=torch.Generator()),
            lambda: nn.Linear(10**6, 10**6),
            lambda: nn.LSTM(8, 10**6),
            lambda: nn.Embedding(10**9, 1000),
            lambda: [torch.empty(10**9) for _ in range(1000)],
        ],
    )
    def test_tensors_beyond_the_memory_are_never_made(self, make, monkeypatch):
        monkeypatch.setattr(memory, "total_memory", lambda *_: 10**10)
        message = r"the model takes at least [\d,]+ GB of memory, and there are 10: give less"
        with bounded("the model", "give less"), pytest.raises(UserError, match=message):
            make()

    @pytest.mark.parametrize("size", [10**10, 10**12])
    def test_sizes_that_cannot_be_counted_are_refused(self, size):
        with bounded("the model", "give less"), pytest.raises(UserError, match="beyond all memory"):
            nn.Linear(size, size)

    def test_too_many_tensors_are_refused(self):
        with bounded("the model", "give less"), pytest.raises(UserError, match="than 20,000 ten"):
            [torch.empty(1) for _ in range(10**6)]

    def test_what_fits_is_made_as_without(self):
        made = []
        for context in (bounded("the model", "give less"), nullcontext()):
            torch.manual_seed(0)
            with context:
                made.append(nn.LSTM(4, 4).state_dict())
        assert all(torch.equal(*pair) for pair in zip(*(one.values() for one in made), strict=True))
