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
from lightning_modules.checkpoints import KEY, check_trusted
from tests.commands import everything_in

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


def checkpoint(model=MODEL, data=None, weights=None):
    data = data or {"class_path": "datamodules.TextDataModule", "init_args": {}}
    return Checkpoint("some.ckpt", weights or {}, {"model": model, "data": data}, VOCABULARY, 4)


def nested(**init_args):
    flow = MODEL["init_args"]["flow"]
    flow = {**flow, "init_args": {**flow["init_args"], **init_args}}
    return {**MODEL, "init_args": {"flow": flow}}


def vouched_for(found, allowed=()):
    check_trusted(found.config, allowed, found.path)


class TestTrust:
    @pytest.mark.parametrize(
        "model",
        [
            {**MODEL, "class_path": "evil.Module"},
            nested(backbone={"class_path": "evil.Network"}),
            nested(backbone="evil.network"),
            nested(backbone={"class_path": "torch.nn.Sequential", "init_args": {"a": ["evil.x"]}}),
            nested(backbone={"class_path": "torch.hub.load"}),
            nested(backbone={"class_path": "dflowsy.Network"}),
            nested(backbone="os.system"),
        ],
    )
    def test_foreign_classes_are_refused_before_they_are_imported(self, model):
        with pytest.raises(UserError, match=r"some.ckpt names the class .*--allow \w+ if you"):
            load_model(checkpoint(model))

    def test_foreign_data_are_refused(self):
        with pytest.raises(UserError, match=r"names the class evil\.Data"):
            vouched_for(checkpoint(data={"class_path": "evil.Data"}))

    def test_file_names_of_data_are_no_classes(self):
        data = {"class_path": "datamodules.TextDataModule", "init_args": {"path": "corpus.txt"}}
        vouched_for(checkpoint(data=data))

    def test_packages_can_be_allowed(self):
        model = nested(backbone={"class_path": "mine.networks.Small"})
        vouched_for(checkpoint(model), ["mine"])
        with pytest.raises(UserError, match=r"mine\.networks\.Small"):
            vouched_for(checkpoint(model), ["min", "other"])


class TestLoad:
    def test_weights_that_do_not_fit_are_refused(self):
        with pytest.raises(UserError, match=r"the weights in some\.ckpt do not fit the model"):
            load_model(checkpoint())

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
        with pytest.raises(UserError, match="cannot write the checkpoint"):
            WholeCheckpoints().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        assert everything_in(tmp_path) == ["last.ckpt"]


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
