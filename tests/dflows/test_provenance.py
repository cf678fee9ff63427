"""Provenance: the commit that ran, the versions, and a device without the machine's name."""

import platform
import subprocess

import pytest
import torch

from dflows import provenance
from dflows.provenance import describe_device, revision, versions


def test_versions_are_those_that_run():
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert set(found) == {"python", "dflows", "torch", "pytorch-lightning"}


@pytest.mark.parametrize("count", [1, 2])
def test_device_is_described_without_the_name_of_the_machine(count):
    text = describe_device("cpu", count)
    assert "thread" in text
    assert text.startswith("2 x ") == (count == 2)
    assert platform.node() not in text
    assert "unknown" not in text


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a module in a package, which dflows.provenance takes for itself."""
    file = tmp_path / "dflows" / "provenance.py"
    file.parent.mkdir()
    file.write_text("one = 1\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json").write_text("{}")
    monkeypatch.setattr(provenance, "__file__", str(file))
    monkeypatch.delenv("GIT_DIR", raising=False)

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init", "--quiet")
    return tmp_path, git


def test_revision_is_the_commit(checkout):
    folder, git = checkout
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert revision() == commit
    (folder / "untracked").write_text("")
    (folder / "results" / "x.json").write_text("[]")
    assert revision() == commit
    (folder / "dflows" / "provenance.py").write_text("one = 2\n")
    assert revision() == f"{commit}-dirty"


def test_revision_is_the_version_where_dflows_is_not_part_of_the_repository(checkout):
    folder, git = checkout
    (folder / ".gitignore").write_text("dflows\n")
    git("add", ".gitignore")
    git("commit", "--quiet", "-m", "the user's own repository")
    assert revision() == f"dflows-{versions()['dflows']}"


def test_revision_is_the_version_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert revision() == f"dflows-{versions()['dflows']}"
