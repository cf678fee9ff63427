"""A checkpoint is read as it was written, or not at all."""

import os
import random
import zipfile

import pytest
import torch

from dflows.cli.checkpoints import WholeCheckpoints
from dflows.errors import UserError
from lightning_modules.checkpoints import KEY, read_content

CONTENT = {
    "state_dict": {f"w{number}": torch.arange(100.0) + number for number in range(4)},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
    KEY: {"config": {"model": {"class_path": "lightning_modules.FlowModule"}}, "length": 4},
}


def sealed(path, content=CONTENT):
    WholeCheckpoints().save_checkpoint(content, path)


def plain(path, content=CONTENT):
    """Writes a checkpoint as others do."""
    torch.save(content, path)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.ckpt"


def is_refused(path):
    """Whether a file is refused; if it is not, it holds what was written."""
    try:
        found = read_content(path)
    except UserError as error:
        return str(error).startswith(f"{path} is ")
    assert same(found, CONTENT)
    return False


@pytest.mark.parametrize("write", [sealed, plain])
def test_a_whole_file_is_read_by_us_and_by_others(write, path):
    write(path)
    assert same(read_content(path), CONTENT)
    assert same(torch.load(path, weights_only=True), CONTENT)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"dflows crc32 ") == (write is sealed)


@pytest.mark.parametrize("write", [sealed, plain])
def test_a_flipped_bit_is_found_or_changes_nothing(write, path):
    write(path)
    whole, draw, harmless = path.read_bytes(), random.Random(0), []
    for _ in range(300):
        place, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        if not is_refused(path):
            harmless.append(place)
    if write is sealed:
        # What marks the seal has none: without the mark the archive's own checksums are looked at.
        assert all(whole.index(b"dflows crc32") - 2 <= place for place in harmless)
    else:
        # Between the members of another's archive lie names and gaps that nobody reads.
        assert 300 > len(harmless) > 0


def test_a_flipped_bit_of_the_weights_is_found_in_any_archive(path):
    plain(path)
    whole = path.read_bytes()
    weights = (torch.arange(100.0) + 2).numpy().tobytes()
    place = whole.index(weights)
    for index in range(place, place + len(weights), 7):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 4]) + whole[index + 1 :])
        assert is_refused(path)


@pytest.mark.parametrize("write", [sealed, plain])
def test_a_cut_file_is_refused_or_whole(write, path):
    write(path)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 37), *range(len(whole) - 60, len(whole) - 22)]:
        path.write_bytes(whole[:size])
        assert is_refused(path)
    for size in range(len(whole) - 22, len(whole)):
        path.write_bytes(whole[:size])
        is_refused(path)


class Command:
    def __reduce__(self):
        return os.system, ("touch touched",)


class Bytes:
    """What is made of a number alone."""

    def __reduce__(self):
        return bytearray, (10**12,)


def test_no_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain(path, {"state_dict": {}, "more": Command()})
    for read in (read_content, WholeCheckpoints().load_checkpoint):
        with pytest.raises(UserError, match="is damaged or no checkpoint of dflows"):
            read(path)
    with pytest.raises(UserError, match="is damaged or no checkpoint of dflows"):
        WholeCheckpoints().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "touched").exists()


class TestMemory:
    def test_a_packed_archive_is_refused(self, path, tmp_path):
        plain(tmp_path / "other", {"state_dict": {"w": torch.zeros(10**6)}})
        with (
            zipfile.ZipFile(tmp_path / "other") as stored,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for name in stored.namelist():
                packed.writestr(name, stored.read(name))
        assert path.stat().st_size < 10_000
        with pytest.raises(UserError, match="its parts are packed"):
            read_content(path)

    def test_bytes_made_of_a_number_are_refused(self, path):
        plain(path, {"state_dict": {}, "more": Bytes()})
        with pytest.raises(UserError, match="it holds a bytearray"):
            read_content(path)

    def test_a_tensor_that_repeats_one_number_is_refused(self, path):
        plain(path, {"state_dict": {"w": torch.zeros(1).expand(10**12)}})
        with pytest.raises(UserError, match=r"last\.ckpt takes at least 4,000 GB of memory"):
            read_content(path)

    def test_parts_of_parts_are_looked_at_once(self, path):
        nest = [torch.zeros(1)]
        for _ in range(60):
            nest = [nest] * 2
        plain(path, {"state_dict": {}, "more": nest})
        assert read_content(path)["state_dict"] == {}


@pytest.mark.parametrize("content", [[], {"a": 1}, {"state_dict": []}, {"state_dict": 3}, "text"])
def test_what_is_no_checkpoint_is_refused(content, path):
    plain(path, content)
    with pytest.raises(UserError, match="is a checkpoint of something else"):
        read_content(path)
