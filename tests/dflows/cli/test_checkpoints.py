"""Checkpoints: whole or absent, and read without trust in what they name."""

import pytest
import torch

from datamodules import CharacterVocabulary
from dflows.cli.checkpoints import (
    Checkpoint,
    WholeCheckpoints,
    checkpoint_argument,
    describe_run,
    load_model,
    read_checkpoint,
)
from dflows.errors import UserError
from lightning_modules.checkpoints import KEY
from tests.commands import everything_in
from tests.disks import fill_disk

MODEL = {
    "class_path": "lightning_modules.LanguageModel",
    "init_args": {
        "flow": {
            "class_path": "dflows.flows.language_model",
            "init_args": {
                "num_classes": 3,
                "length": 4,
                "backbone": {"class_path": "dflows.backbones.LSTM", "init_args": {"width": 4}},
            },
        }
    },
}
VOCABULARY = CharacterVocabulary("abc")


def checkpoint():
    return Checkpoint("some.ckpt", {}, {"model": MODEL, "data": {}}, VOCABULARY, 4)


class TestLoad:
    def test_weights_that_do_not_fit_are_refused(self):
        with pytest.raises(UserError, match=r"the weights in some\.ckpt do not fit the model"):
            load_model(checkpoint())

    def test_another_vocabulary_is_refused(self):
        other = CharacterVocabulary("abcd")
        config = {"model": MODEL, "data": {}}
        with pytest.raises(UserError, match=r"has 3 classes, and its vocabulary has 4"):
            load_model(Checkpoint("some.ckpt", _weights(), config, other, 4))

    @pytest.mark.parametrize(
        "change",
        [
            {"flow.base.conditioner.head.bias": torch.zeros(7)},
            {"flow.base.conditioner.head.bias": 3},
            {"flow.base.conditioner.head.bias": "text"},
            {"flow.base.conditioner.head.bias": None},
            {"flow.base.conditioner.head.bias": torch.zeros(3, device="meta")},
            {"more": torch.zeros(3)},
            {3: torch.zeros(3)},
        ],
    )
    def test_weights_of_other_kinds_are_refused(self, change):
        found = checkpoint()
        weights = {**_weights(), **change}
        with pytest.raises(UserError, match=r"the weights in some\.ckpt do not fit the model"):
            load_model(Checkpoint("some.ckpt", weights, found.config, VOCABULARY, 4))

    def test_the_configuration_is_left_as_it_is(self):
        found = checkpoint()
        model = load_model(
            Checkpoint(
                "some.ckpt",
                _weights(),
                found.config,
                VOCABULARY,
                4,
            )
        )
        assert not model.training
        assert found.config["model"] == MODEL

    def test_what_was_written_is_read(self, tmp_path):
        described = describe_run({"model": MODEL, "data": {}}, VOCABULARY.to_json(), 4)
        content = {"state_dict": _weights(), KEY: described}
        WholeCheckpoints().save_checkpoint(content, tmp_path / "run" / "last.ckpt")
        assert everything_in(tmp_path) == ["run", "run/last.ckpt"]
        found = read_checkpoint(tmp_path / "run")
        assert found.vocabulary == VOCABULARY
        assert load_model(found).flow.length == found.length == 4


def _weights():
    from dflows import flows
    from dflows.backbones import LSTM
    from lightning_modules import LanguageModel

    return LanguageModel(flows.language_model(3, 4, lambda: LSTM(width=4))).state_dict()


@pytest.mark.parametrize(
    "described",
    [
        "text",
        {"format": 2},
        {"format": 1},
        {"format": 1, "config": [], "vocabulary": "{}", "length": 4},
        {"format": 1, "config": {}, "vocabulary": 3, "length": 4},
        {"format": 1, "config": {}, "vocabulary": "{}", "length": 4.5},
        {"format": 1, "config": {}, "vocabulary": "{}", "length": 0},
        {"format": "2" * 1000},
        {"format": 1, "config": {}, "vocabulary": "[" * 100_000, "length": 4},
        {"format": 1, "config": {"a": torch.zeros(1)}, "vocabulary": "{}", "length": 4},
        {"format": 1, "config": {"a": [[0] * 1000] * 200}, "vocabulary": "{}", "length": 4},
    ],
)
def test_a_description_that_is_none_is_refused(described, tmp_path):
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"state_dict": {}, KEY: described}, path)
    with pytest.raises(UserError, match=r"last\.ckpt"):
        read_checkpoint(path)


class TestWhole:
    def test_a_failure_leaves_the_file_that_was_there(self, tmp_path):
        path = tmp_path / "last.ckpt"
        WholeCheckpoints().save_checkpoint({"step": 1}, path)
        with pytest.raises((AttributeError, TypeError, RuntimeError)):
            WholeCheckpoints().save_checkpoint({"step": lambda: 2}, path)
        assert everything_in(tmp_path) == ["last.ckpt"]
        assert torch.load(path, weights_only=True) == {"step": 1}

    def test_what_cannot_be_written_is_the_user_s_to_mend(self, tmp_path):
        (tmp_path / "last.ckpt").mkdir()
        with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: Is a directory: a folder"):
            WholeCheckpoints().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        assert everything_in(tmp_path) == ["last.ckpt"]

    @pytest.mark.parametrize("written", [0, 1000, 5000])
    def test_a_disk_that_fills_up_is_named_and_leaves_the_file_that_was_there(
        self, tmp_path, monkeypatch, written
    ):
        path = tmp_path / "last.ckpt"
        WholeCheckpoints().save_checkpoint({"step": 1}, path)
        fill_disk(monkeypatch, written)
        with pytest.raises(UserError, match=r"last\.ckpt: No space left on device: make room"):
            WholeCheckpoints().save_checkpoint({"weights": torch.rand(10_000)}, path)
        assert everything_in(tmp_path) == ["last.ckpt"]
        assert torch.load(path, weights_only=True) == {"step": 1}
        monkeypatch.undo()
        WholeCheckpoints().save_checkpoint({"step": 2}, path)
        assert torch.load(path, weights_only=True) == {"step": 2}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (None, [])),
        (["--checkpoint", "a"], ("a", [])),
        (["--checkpoint=a", "--allow", "b", "c", "--data.length", "3"], ("a", ["b", "c"])),
        (["--checkpoint", "a", "--help"], (None, [])),
    ],
)
def test_the_checkpoint_is_found_before_all_other_arguments(arguments, expected):
    assert checkpoint_argument(arguments) == expected
