"""The examples, run as an outsider would: in a folder of their own."""

import shutil

import pytest

from tests.commands import ROOT, run_apart


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside") / "own_backbone"
    shutil.copytree(ROOT / "examples" / "own_backbone", folder)
    short = ("--trainer.max_steps", 20, "--trainer.val_check_interval", 10)
    done = run_apart("fit", "--config", "neighbours.yaml", *short, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test, bits per character" in done.stdout
    return folder


def test_a_foreign_class_is_imported_only_if_it_is_allowed(folder):
    checkpoint = ("--checkpoint", "runs/neighbours/version_0", "--num_samples", 1)
    done = run_apart("generate", *checkpoint, cwd=folder)
    assert done.returncode == 1
    assert "names the class neighbours.Neighbours" in done.stderr
    assert "add --allow neighbours" in done.stderr
    done = run_apart("generate", *checkpoint, "--allow", "neighbours", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 33


def test_the_readme_names_what_there_is(folder):
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "python -m dflows.fit --config neighbours.yaml" in readme
    assert "--allow neighbours" in readme
