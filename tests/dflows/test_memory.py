"""What cannot fit is refused before it is begun."""

import pytest

from dflows import memory
from dflows.errors import UserError
from dflows.memory import check_memory, total_memory


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
