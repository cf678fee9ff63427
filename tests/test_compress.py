"""``python -m dflows.compress`` and ``dflows.decompress`` from a checkpoint alone."""

import io
import math
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from dflows.cli import fitting
from dflows.cli.compressors import compressors, measure
from dflows.cli.models import exact_flow
from dflows.errors import UserError
from dflows.records import read_record
from tests.commands import (
    command_line,
    environment,
    finished_run,
    run_here,
    small_config,
    write_text,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    return finished_run(tmp_path_factory.mktemp("compress"))


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path, 700)


def told(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def test_a_file_comes_back(run, text, capsys):
    content = text.read_bytes()
    assert run_here("compress", "--checkpoint", run, text) == 0
    archive = text.with_name("odd.txt.dfl")
    size = len(archive.read_bytes())
    line = told(capsys)
    assert f"{len(content):,} bytes, 700 characters; {archive}: {size:,} bytes" in line
    assert f"{8 * size / 700:.4f} bits each" in line
    text.unlink()
    assert run_here("decompress", "--checkpoint", run, archive) == 0
    assert text.read_bytes() == content
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_commands_stand_in_a_pipe(run, text):
    one, other = (
        command_line(name, "--checkpoint", run, "-") for name in ("compress", "decompress")
    )
    back = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{shlex.join(one)} | {shlex.join(other)}"],
        input=text.read_bytes(),
        capture_output=True,
        env=environment(),
        check=True,
        timeout=300,
    )
    assert back.stdout == text.read_bytes()


def test_the_standard_streams(run, text, monkeypatch, tmp_path):
    output = SimpleNamespace(
        buffer=io.BytesIO(), isatty=lambda: False, write=print, flush=lambda: None
    )
    monkeypatch.setattr(sys, "stdout", output)
    assert run_here("compress", "--checkpoint", run, text, "-o", "-") == 0
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(output.buffer.getvalue())))
    assert run_here("decompress", "--checkpoint", run, "-", "-o", tmp_path / "back") == 0
    assert (tmp_path / "back").read_bytes() == text.read_bytes()


@pytest.mark.parametrize("content", [b"", b"a", b"\xff\0\r\n", "Ça va? 漢字".encode()])
def test_any_content_comes_back(run, tmp_path, content):
    file, back = tmp_path / "any", tmp_path / "back"
    file.write_bytes(content)
    assert run_here("compress", "--checkpoint", run, file) == 0
    assert run_here("decompress", "--checkpoint", run, tmp_path / "any.dfl", "-o", back) == 0
    assert back.read_bytes() == content


class TestRefusals:
    """One line, a code that is not 0, and nothing written."""

    def refused(self, capsys, folder, *arguments):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        assert run_here(*arguments) == 1
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = [line for line in captured.err.splitlines() if line.startswith("error")]
        assert len(lines) == 1
        return lines[0]

    @pytest.fixture
    def archive(self, run, text, capsys):
        assert run_here("compress", "--checkpoint", run, text, "-o", text.with_name("a.dfl")) == 0
        capsys.readouterr()
        return text.with_name("a.dfl")

    def test_a_damaged_archive(self, run, archive, capsys, tmp_path):
        content = bytearray(archive.read_bytes())
        content[len(content) // 2] ^= 4
        archive.write_bytes(content)
        line = self.refused(capsys, tmp_path, "decompress", "--checkpoint", run, archive)
        assert line == f"error: {archive} is damaged: take it from its source again"

    def test_another_checkpoint(self, tmp_path_factory, archive, capsys, tmp_path):
        other = finished_run(tmp_path_factory.mktemp("other"), max_steps=1) / "last.ckpt"
        capsys.readouterr()
        arguments = ("decompress", "--checkpoint", other, archive)
        assert "was written by a model of other weights" in self.refused(
            capsys, tmp_path, *arguments
        )

    def test_a_text(self, run, text, capsys, tmp_path):
        arguments = ("decompress", "--checkpoint", run, text, "-o", tmp_path / "back")
        assert "odd.txt is no archive of dflows" in self.refused(capsys, tmp_path, *arguments)

    def test_a_name_without_the_suffix(self, run, text, capsys, tmp_path):
        line = self.refused(capsys, tmp_path, "decompress", "--checkpoint", run, text)
        assert "does not end in .dfl" in line

    def test_an_output_that_is_there(self, run, archive, text, capsys, tmp_path):
        archive.rename(archive.with_name("odd.txt.dfl"))
        for command, file in (("compress", text), ("decompress", text.with_name("odd.txt.dfl"))):
            line = self.refused(capsys, tmp_path, command, "--checkpoint", run, file)
            assert "is there already: give it by -o to replace it" in line

    def test_the_input_as_the_output(self, run, text, capsys, tmp_path):
        line = self.refused(capsys, tmp_path, "compress", "--checkpoint", run, text, "-o", text)
        assert "is the input and the output: give another -o" in line

    def test_a_file_that_is_missing(self, run, capsys, tmp_path):
        arguments = ("compress", "--checkpoint", run, tmp_path / "none")
        assert "none: No such file or directory: give a file" in self.refused(
            capsys, tmp_path, *arguments
        )

    @pytest.mark.parametrize("output", ["missing/a.dfl", "."])
    def test_an_output_in_no_folder(self, run, text, capsys, tmp_path, output):
        arguments = ("compress", "--checkpoint", run, text, "-o", tmp_path / output)
        assert ": give a file" in self.refused(capsys, tmp_path, *arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--passes", 0), "passes is 0: give at least 1"),
            (("--passes", 2), "2 passes were asked for"),
            (("--window", 8), "8 dimensions were asked for"),
            (("--batch_size", 0), "batch_size is 0"),
            (("--threads", 0), "threads is 0"),
            (("--device", "gpu"), "device gpu is not available"),
            (("--benchmark", "-o", "-"), "benchmark reads the file again"),
        ],
    )
    def test_numbers_that_cannot_be(self, run, text, capsys, tmp_path, arguments, message):
        line = self.refused(capsys, tmp_path, "compress", "--checkpoint", run, text, *arguments)
        assert message in line

    def test_a_terminal(self, run, text, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        line = self.refused(capsys, tmp_path, "compress", "--checkpoint", run, text, "-o", "-")
        assert "the output would go to the terminal: give -o FILE" in line


def test_a_link_keeps_its_place_and_a_pipe_gets_the_output(run, text, tmp_path):
    (tmp_path / "real.dfl").write_bytes(b"before")
    link, pipe = tmp_path / "link.dfl", tmp_path / "pipe"
    link.symlink_to("real.dfl")
    os.mkfifo(pipe)
    assert run_here("compress", "--checkpoint", run, text, "-o", link) == 0
    assert link.is_symlink()
    content = (tmp_path / "real.dfl").read_bytes()
    with ThreadPoolExecutor() as pool:
        found = pool.submit(pipe.read_bytes)
        assert run_here("compress", "--checkpoint", run, text, "-o", pipe) == 0
        assert found.result(60) == content
        pool.submit(pipe.write_bytes, content)
        assert run_here("decompress", "--checkpoint", run, pipe, "-o", tmp_path / "back") == 0
    assert pipe.is_fifo()
    assert (tmp_path / "back").read_bytes() == text.read_bytes()


@pytest.mark.parametrize("kind", ["bound", "no flow"])
def test_what_cannot_be_encoded_is_refused_by_name(kind):
    if kind == "bound":
        module = SimpleNamespace(likelihood="bound")
        message = "the likelihood of a SimpleNamespace is a bound, and nothing can be encoded"
    else:
        module = SimpleNamespace(likelihood="exact")
        message = "a SimpleNamespace has no flow, whose levels could be decoded"
    with pytest.raises(UserError, match=message):
        exact_flow(module)


def test_a_proof_that_fails_leaves_the_record(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def fail(*_):
        raise UserError("the archive decodes to something else")

    monkeypatch.setattr(fitting, "prove", fail)
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config, "--archive=true", "--record", "records") == 1
    assert told(capsys) == "error: the archive decodes to something else"
    assert read_record(tmp_path / "records" / "small-1.json").metrics["test_bpc"] > 0


def test_a_proof_is_of_the_whole_split(run, capsys):
    arguments = ("--checkpoint", run, "--archive", "--trainer.limit_test_batches", 1)
    assert run_here("evaluate", *arguments) == 1
    assert "trainer.limit_test_batches is 1: an archive is of the whole split" in told(capsys)


def test_an_archive_that_does_not_decode_gets_no_name(run, text, capsys, monkeypatch):
    from dflows.codec import texts

    plain = texts.written
    monkeypatch.setattr(
        texts, "written", lambda flow, groups, crc, **rest: plain(flow, groups, crc ^ 1, **rest)
    )
    assert run_here("compress", "--checkpoint", run, text) == 1
    assert "the new archive cannot be decoded here" in told(capsys)
    assert not text.with_name("odd.txt.dfl").exists()
    assert run_here("compress", "--checkpoint", run, text, "--verify=false") == 0


def test_a_benchmark_prints_and_records_all_compressors(run, text, capsys, tmp_path):
    options = ("--benchmark", "--record", tmp_path / "records")
    assert run_here("compress", "--checkpoint", run, text, *options) == 0
    out = capsys.readouterr().out
    record = read_record(tmp_path / "records" / "small-archive-1.json")
    size = text.with_name("odd.txt.dfl").stat().st_size
    assert record.metrics["archive_bytes"] == size
    assert record.metrics["characters"] == {"odd.txt": 700}
    for name, size in record.metrics["compressed_bytes"].items():
        assert f"{size:,}" in out
        assert 0 < record.metrics["primed_bytes"][name] < size
    for name in ("dflows, 3 passes", "gzip -9", "bzip2 -9", "xz -9e", "zstd", "PPMd, order"):
        assert name in out
    assert "is not installed" not in out
    assert "not on this machine" not in out


@pytest.mark.parametrize("compressor", [*compressors()], ids=lambda each: each.name)
def test_other_compressors_give_the_text_back(compressor):
    content, primer = b"the cat sat on the mat " * 50, b"a cat sat there " * 50
    line = measure(compressor, content, primer)
    assert len(compressor.compress(content)) == line.size < len(content)
    assert line.primed < line.size + 10


def test_a_run_proves_its_own_figure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config, "--archive=true", "--record", "records") == 0
    metrics = read_record(tmp_path / "records" / "small-1.json").metrics
    bits = metrics["test_bpc"] * 300
    assert bits <= 8 * metrics["archive_bytes"] <= bits + 8 * 220


def test_the_archive_of_a_split_is_its_code_length(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ("--checkpoint", run, "--archive", "--record", "records")
    assert run_here("evaluate", *arguments) == 0
    metrics = read_record(tmp_path / "records" / "small-test-1.json").metrics
    bits = metrics["test_bpc"] * 300
    assert bits <= 8 * metrics["archive_bytes"] <= bits + 8 * 220
    assert metrics["archive_bpc"] == 8 * metrics["archive_bytes"] / 300
    assert f"{metrics['archive_bpc']:.4f}" in capsys.readouterr().out
    assert run_here("evaluate", *arguments, "--split", "valid", "--data.length", 8) == 0
    metrics = read_record(tmp_path / "records" / "small-valid-1.json").metrics
    bits = metrics["valid_bpc"] * 300
    assert bits <= 8 * metrics["archive_bytes"] <= bits + 8 * 400
    assert math.isfinite(metrics["archive_seconds"] + metrics["archive_seconds_back"])
