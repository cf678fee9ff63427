"""What the guide to one's own data shows runs as it stands there."""

import re
import shlex

import numpy as np
import pytest
import yaml

from tests.commands import ROOT, run_here

GUIDE = (ROOT / "docs" / "guide" / "data.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)


def command_lines():
    commands = [shlex.split(line) for line in "".join(blocks("bash")).splitlines()]
    assert all(words[:2] == ["python", "-m"] for words in commands)
    return [(words[2].removeprefix("dflows."), words[3:]) for words in commands]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a reader, where the shipped configuration trains a small network for a step."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / "configs" / "array.yaml").read_text(encoding="utf-8"))
    small = {"class_path": "dflows.backbones.LSTM", "init_args": {"width": 4}}
    config["model"]["init_args"]["flow"]["init_args"]["backbone"] = small
    config["trainer"] |= {"max_steps": 1, "precision": "32-true"}
    config["progress_bar"] = {"refresh_rate": 0}
    (tmp_path / "array.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return tmp_path


def test_from_a_file_of_numpy_to_bits_samples_and_scores(folder, capsys):
    making, loading = blocks("python")
    exec(making, {})
    rows = np.load("strokes.npy")
    assert (rows.shape, rows.dtype, rows.max()) == ((2000, 64), "uint8", 16)
    for split, part in zip(("train", "valid", "test"), np.split(rows, [1600, 1800]), strict=True):
        np.save(f"{split}.npy", part)
    printed = {}
    for command, arguments in command_lines():
        assert run_here(command, *arguments) == 0, arguments
        printed[command, len(arguments)] = capsys.readouterr().out
    assert "test, nats per row" in printed["evaluate", 2]
    assert np.loadtxt(printed["generate", 6].splitlines(), dtype=int).shape == (100, 64)
    assert printed["generate", 4].startswith("0 0 0 16 16 0 0 0 ")
    assert "the most surprising rows" in printed["score", 3]
    assert len((folder / "scores.jsonl").read_text().splitlines()) == 2001
    names = {}
    exec(loading, names)
    model = names["model"]
    assert model.log_prob(names["rows"]).shape == (100,)
    assert model.sample_indices(10, seed=1).shape == (10, 64)
