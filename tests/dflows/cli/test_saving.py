"""What a run keeps; tests/test_resume.py resumes from it."""

import pytest
import torch

from dflows.cli.saving import BestCheckpoint


def state_of(folder, path):
    return {
        "monitor": "valid_bpc",
        "dirpath": str(folder),
        "best_model_path": str(path),
        "best_model_score": torch.tensor(1.5),
        "current_score": torch.tensor(1.5),
        "best_k_models": {str(path): torch.tensor(1.5)},
        "kth_best_model_path": str(path),
        "kth_value": torch.tensor(1.5),
        "last_model_path": "",
    }


@pytest.mark.parametrize("place", ["elsewhere", "the folder of the run"])
def test_what_a_checkpoint_calls_its_best_is_no_other_file(tmp_path, place):
    """It would be copied, or deleted at the next best."""
    here = tmp_path / "here"
    folder = here if place == "the folder of the run" else tmp_path / "there"
    for name in {"here", folder.name}:
        (tmp_path / name).mkdir()
    file = folder / "config.yaml"
    file.write_text("a secret", encoding="utf-8")
    best = BestCheckpoint(dirpath=str(here))
    with pytest.warns(UserWarning, match=r"config\.yaml is gone: the search starts again"):
        best.load_state_dict(state_of(folder, file))
    assert best.best_model_path == ""
    assert best.best_k_models == {}


def test_the_best_so_far_is_found_in_the_folder_that_it_was_in(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "best.ckpt").write_bytes(b"weights")
    best = BestCheckpoint(dirpath=str(tmp_path / "here"))
    best.load_state_dict(state_of(there, there / "best.ckpt"))
    assert best.best_model_path == str(there / "best.ckpt")
    assert best.best_model_score == 1.5
