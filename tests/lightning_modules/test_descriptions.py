"""A stranger's description runs no code, reads no file, and takes no memory."""

import copy
import socket

import pytest
import torch

from datamodules.module import StreamDataModule
from dflows.errors import UserError
from lightning_modules import BaseModule
from lightning_modules.descriptions import check_description, instantiate, plain_part

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
DATA = {
    "class_path": "datamodules.TextDataModule",
    "init_args": {"source": {"class_path": "datamodules.KingJames"}, "length": 8},
}
PLACES = {
    "backbone": ("init_args", "flow", "init_args", "backbone"),
    "base of the flow": ("init_args", "flow"),
    "optimization": ("init_args", "optimization"),
    "a list of the module": ("init_args", "optimization", "betas"),
    "model": (),
}
EVIL = "touched = open('touched', 'w')\n\n\nclass Network:\n    pass\n"
SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch touched"}}
CONFIG = "{class_path: os.system, init_args: {command: touch touched}}"
ATTACKS = {
    "a foreign class": {"class_path": "evil.Network"},
    "a foreign function": "evil.Network",
    "a function of the system": SYSTEM,
    "through a trusted module": {**SYSTEM, "class_path": "dflows.cli.errors.os.system"},
    "through a trusted package": {**SYSTEM, "class_path": "lightning_modules.base.os.system"},
    "by its name alone": "dflows.cli.errors.os.system",
    "an importer": {
        "class_path": "lightning_modules.descriptions.import_module",
        "init_args": {"name": "evil"},
    },
    "a resolver": {"class_path": "dflows.cli.callbacks.pkgutil.resolve_name"},
    "a function of dflows": {
        "class_path": "lightning_modules.descriptions._resolve",
        "init_args": {"name": "evil.Network", "package": "evil"},
    },
    "a foreign class through a module": {"class_path": "dflows.cli.errors.argparse.Action"},
    "a foreign class by import": {"class_path": "dflows.flow.Tensor"},
    "an instance": {"class_path": "dflows.cli.errors._KEY"},
    "an attribute of a class": {"class_path": "dflows.backbones.LSTM.forward.__globals__"},
    "a method": {"class_path": "dflows.backbones.LSTM.__subclasshook__"},
    "the module itself": {"class_path": "dflows.backbones"},
    "a neighbour of a package": {"class_path": "dflowsy.Network"},
    "what is not there": {"class_path": "dflows.backbones.Nothing"},
    "a class without a package": {"class_path": "LSTM"},
    "a name that is no name": {"class_path": "dflows.backbones.LSTM; import evil"},
    "a path in place of a class": {"class_path": "/tmp/evil.py"},
    "a number in place of a class": {"class_path": 3},
    "YAML": CONFIG,
    "YAML over lines": "class_path: os.system\ninit_args:\n  command: touch touched\n",
    "JSON": '{"class_path": "os.system", "init_args": {"command": "touch touched"}}',
    "a list in a text": f"[{CONFIG}]",
    "a file": "evil.yaml",
    "a file without a suffix": "evil",
    "a file here": "./evil.yaml",
    "an address": "http://127.0.0.1:1/evil.yaml",
    "a file by address": "file://evil.yaml",
    "a file through fsspec": "local://evil.yaml",
    "data through fsspec": f"data://,{CONFIG}",
    "the standard input": "-",
    "a list": [SYSTEM],
    "deeper": {
        "class_path": "torch.nn.Sequential",
        "init_args": {"args": [{"class_path": "evil.Network"}]},
    },
    "an object": torch.zeros(1),
}


def put(place, value):
    """The description of a model with something in the place of a part."""
    model = copy.deepcopy(MODEL)
    *way, last = place or ("",)
    part = model
    for key in way:
        part = part.setdefault(key, {})
    if not place:
        return value
    part[last] = value
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of a stranger, who waits for anything in it to be read."""
    (tmp_path / "evil.py").write_text(EVIL, encoding="utf-8")
    for name in ("evil.yaml", "evil"):
        (tmp_path / name).write_text(CONFIG.strip("{}"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def connect(*_):
        (tmp_path / "touched").touch()
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tmp_path


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_runs(attack, place, folder):
    model = put(PLACES[place], ATTACKS[attack])
    with pytest.raises(UserError, match=r"some\.ckpt") as caught:
        instantiate(BaseModule, {"model": model}, [], "some.ckpt")
    assert not (folder / "touched").exists()
    assert "\n" not in str(caught.value)


def test_a_description_is_left_as_it_is():
    config = {"model": copy.deepcopy(MODEL)}
    assert instantiate(BaseModule, config, [], "some.ckpt").flow.length == 4
    assert config == {"model": MODEL}


def test_packages_can_be_allowed(folder):
    model = put(PLACES["backbone"], {"class_path": "mine.Small", "init_args": {"width": 4}})
    (folder / "mine.py").write_text(
        "from dflows.backbones import LSTM\n\n\nclass Small(LSTM):\n    pass\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"names the class mine\.Small.*--allow mine if you trust"):
        instantiate(BaseModule, {"model": model}, ["min", "mine.Smal"], "some.ckpt")
    made = instantiate(BaseModule, {"model": model}, ["mine"], "some.ckpt")
    assert type(made.flow.base.conditioner.backbone).__name__ == "Small"


@pytest.mark.parametrize(
    ("text", "refused"),
    [("evil.Network", True), ("evil.yaml", True), ("a/b", True), ("word", False)],
)
def test_arguments_without_a_type_are_words(text, refused, folder):
    (folder / "mine.py").write_text(
        "from dflows.backbones import LSTM\n\n\nclass Small(LSTM):\n"
        "    def __init__(self, width, note=None, **more):\n        super().__init__(width)\n",
        encoding="utf-8",
    )
    network = {"class_path": "mine.Small", "init_args": {"width": 4, "note": text}}
    config = {"model": put(PLACES["backbone"], network)}
    if refused:
        with pytest.raises(UserError, match=r"some\.ckpt names"):
            check_description(config, ["mine"], "some.ckpt")
    else:
        check_description(config, ["mine"], "some.ckpt")
    assert not (folder / "touched").exists()


@pytest.mark.parametrize("key", ["num_classes", "length"])
def test_sizes_beyond_the_memory_are_refused(key):
    model = copy.deepcopy(MODEL)
    model["init_args"]["flow"]["init_args"][key] = 10**12
    with pytest.raises(UserError, match=rf"{key} of 1,000,000,000,000 takes at least 64,000 GB"):
        instantiate(BaseModule, {"model": model}, [], "some.ckpt")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({1: 2}, "a key is 1"),
        ([[0] * 1000] * 200, "over 100,000 values"),
        ("x" * 2_000_000, "a text of 2,000,000 characters"),
    ],
)
def test_what_is_no_description_is_refused(model, reason):
    with pytest.raises(UserError, match=rf"the description in some\.ckpt is damaged: .*{reason}"):
        check_description({"model": model}, [], "some.ckpt")


def test_a_nest_is_refused():
    model = []
    for _ in range(100_000):
        model = [model]
    with pytest.raises(UserError, match="nested more than 64 deep"):
        check_description({"model": model}, [], "some.ckpt")


class TestData:
    def test_what_is_read_again_says_the_same(self):
        plain = plain_part(StreamDataModule, "data", {"data": DATA}, [], "some.ckpt")
        assert plain["class_path"] == "datamodules.TextDataModule"
        assert plain["init_args"]["source"]["class_path"] == "datamodules.KingJames"
        assert plain["init_args"]["length"] == 8

    @pytest.mark.parametrize(
        "source",
        [
            {"class_path": "evil.Data"},
            {"class_path": "dflows.cli.errors.os.system", "init_args": {"command": "true"}},
            CONFIG,
            "evil.yaml",
            "http://127.0.0.1:1/evil.yaml",
        ],
    )
    def test_foreign_sources_are_refused(self, source, folder):
        data = {**DATA, "init_args": {**DATA["init_args"], "source": source}}
        with pytest.raises(UserError, match=r"some\.ckpt"):
            plain_part(StreamDataModule, "data", {"data": data}, [], "some.ckpt")
        assert not (folder / "touched").exists()

    def test_no_text_is_read_as_a_configuration_later(self):
        data = {**DATA, "init_args": {**DATA["init_args"], "vocabulary": CONFIG}}
        with pytest.raises(UserError, match="vocabulary is a text that holds keys of YAML"):
            plain_part(StreamDataModule, "data", {"data": data}, [], "some.ckpt")

    def test_names_of_files_are_names(self):
        source = {"class_path": "datamodules.LocalText", "init_args": {"path": "corpus.txt"}}
        data = {**DATA, "init_args": {**DATA["init_args"], "source": source}}
        plain = plain_part(StreamDataModule, "data", {"data": data}, [], "some.ckpt")
        assert plain["init_args"]["source"]["init_args"]["path"] == "corpus.txt"
