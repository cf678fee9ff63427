"""A stranger's description runs no code, reads no file, asks no address, and takes no memory."""

import copy
import inspect
import os
import random
import re
import sys
from pathlib import Path

import pytest
import torch

from datamodules.module import StreamDataModule
from dflows import backbones, flows, memory, orderings
from dflows.errors import UserError
from lightning_modules import BaseModule
from lightning_modules.descriptions import check_description, instantiate

MODEL = {
    "class_path": "lightning_modules.FlowModule",
    "init_args": {
        "flow": {
            "class_path": "dflows.flows.stack",
            "init_args": {
                "num_classes": 3,
                "length": 4,
                "orderings": [
                    {"class_path": "dflows.orderings.Natural"},
                    {"class_path": "dflows.orderings.Parity", "init_args": {"first": 1}},
                ],
                "backbone": {"class_path": "dflows.backbones.LSTM", "init_args": {"width": 4}},
                "base": {"class_path": "dflows.FactorizedBase", "init_args": {"sharing": "levels"}},
            },
        },
        "objective": {"class_path": "dflows.objectives.EndToEnd"},
        "optimization": {"learning_rate": 0.01, "betas": [0.9, 0.99]},
    },
}
DATA = {
    "class_path": "datamodules.TextDataModule",
    "init_args": {"source": {"class_path": "datamodules.KingJames"}, "length": 8},
}
PLACES = {
    "model": (),
    "flow": ("init_args", "flow"),
    "backbone": ("init_args", "flow", "init_args", "backbone"),
    "base": ("init_args", "flow", "init_args", "base"),
    "orderings": ("init_args", "flow", "init_args", "orderings"),
    "ordering": ("init_args", "flow", "init_args", "orderings", 0),
    "optimization": ("init_args", "optimization"),
    "number": ("init_args", "flow", "init_args", "backbone", "init_args", "width"),
}
EVIL = "open('touched', 'w').close()\n\n\nclass Network:\n    pass\n"
COMMAND = {"command": "touch touched"}
SYSTEM = {"class_path": "os.system", "init_args": COMMAND}
CONFIG = "{class_path: os.system, init_args: {command: touch touched}}"


def named(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


ATTACKS = {
    # The ways of the issue: attributes of trusted modules, texts that are parsed, files, addresses.
    "os.system through a module": named("dflows.cli.errors.os.system", **COMMAND),
    "an importer through a module": named("dflows.cli.errors.import_module", name="evil"),
    "YAML": CONFIG,
    "YAML over lines": "class_path: os.system\ninit_args:\n  command: touch touched\n",
    "JSON": '{"class_path": "os.system", "init_args": {"command": "touch touched"}}',
    "a file": "evil.yaml",
    "a file here": "./evil.yaml",
    "a file without a suffix": "evil",
    "http": "http://127.0.0.1:1/evil.yaml",
    "file": "file://evil.yaml",
    "local": "local://evil.yaml",
    "data": f"data://,{CONFIG}",
    # Others.
    "a foreign class": named("evil.Network"),
    "a foreign class that claims a trusted name": named("dflowsy.Network"),
    "a function of the system": SYSTEM,
    "through a package": named("lightning_modules.base.os.system", **COMMAND),
    "through torch": named("torch.nn.functional.importlib.import_module", name="evil"),
    "through torch's own loader": named("torch.nn.modules.module.torch.hub.load", repo_or_dir="x"),
    "a foreign class through a module": named("dflows.cli.errors.argparse.FileType", mode="w"),
    "a foreign class that a module imports": named("dflows.flow.Tensor"),
    "a resolver": named("dflows.cli.callbacks.pkgutil.resolve_name", name="evil"),
    "our own resolver": named("lightning_modules.descriptions._find", name="evil", package="evil"),
    "a command": named("dflows.fit.main", arguments=["--config", "evil.yaml"]),
    "the command line's class": named("dflows.cli.configs.FlowCLI", arguments=["--c", "evil.yaml"]),
    "a trainer": named("dflows.cli.trainer.Trainer", default_root_dir="touched"),
    "what writes files": named("dflows.cli.callbacks.RunFolder", name="touched"),
    "a reader of files": named("datamodules.LocalText", path="evil.yaml"),
    "an instance": named("dflows.cli.errors._KEY"),
    "globals": named("dflows.backbones.LSTM.forward.__globals__"),
    "a method": named("dflows.backbones.LSTM.__subclasshook__"),
    "a base class": named("dflows.backbones.LSTM.__base__.__base__.__base__.__subclasses__"),
    "a metaclass": named("dflows.backbones.LSTM.__class__", name="x"),
    "a module": named("dflows.backbones"),
    "what is not there": named("dflows.backbones.Nothing"),
    "a class without a package": named("LSTM"),
    "code for a name": named("dflows.backbones.LSTM; import evil"),
    "a path for a name": named("/tmp/evil.py"),
    "a name with a space": named(" evil.Network"),
    "a number for a name": named(3),
    "a description for a name": named(SYSTEM),
    "texts for arguments": {"class_path": "dflows.backbones.LSTM", "init_args": "evil.yaml"},
    "a name alone": "os.system",
    "a trusted name alone": "dflows.cli.errors.os.system",
    "YAML in a list": [CONFIG],
    "the standard input": "-",
    "a list of descriptions": [SYSTEM],
    "an argument that nothing expects": named("dflows.backbones.LSTM", width=4, hook=SYSTEM),
    "within a network of torch": named("torch.nn.Sequential", args=[SYSTEM]),
    "within torch's arguments": named("torch.nn.LSTM", input_size=4, hidden_size=SYSTEM),
    "an activation": named(
        "torch.nn.TransformerEncoderLayer", d_model=4, nhead=1, activation="os.system"
    ),
    "an object": torch.zeros(1),
    "a set": {"os.system"},
    "no text for a key": {**SYSTEM, 3: 4},
    "what contains itself": None,
}
ATTACKS["what contains itself"] = itself = [SYSTEM]
itself.append(itself)


def put(place, value, description=MODEL):
    """A description with something in the place of a part."""
    if not place:
        return value
    made = copy.deepcopy(description)
    *way, last = place
    part = made
    for key in way:
        part = part[key]
    part[last] = value
    return made


class Watch:
    """What the interpreter tells of programs, addresses, and files in one folder."""

    EVENTS = ("os.system", "subprocess.Popen", "os.exec", "socket.connect", "socket.getaddrinfo")

    def __init__(self):
        self.folder, self.seen = None, []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.folder is None:
            return
        opened = event in ("open", "os.mkdir") and isinstance(arguments[0], (str, bytes))
        if event in self.EVENTS or (
            opened and self.folder in Path(os.fsdecode(arguments[0])).absolute().parents
        ):
            self.seen.append((event, *arguments))


WATCH = Watch()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of a stranger, in which nothing may be read or written."""
    (tmp_path / "evil.py").write_text(EVIL, encoding="utf-8")
    for name in ("evil.yaml", "evil"):
        (tmp_path / name).write_text(CONFIG.strip("{}"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    WATCH.folder, WATCH.seen = tmp_path, []
    yield tmp_path
    WATCH.folder = None
    assert WATCH.seen == []
    assert not (tmp_path / "touched").exists()
    assert "evil" not in sys.modules


class TestWatch:
    @pytest.mark.parametrize(
        "act",
        [
            lambda _: os.system("true"),
            lambda folder: open(folder / "evil.yaml").close(),  # noqa: PTH123
            lambda _: open("new", "w").close(),  # noqa: PTH123
            lambda _: __import__("evil"),
        ],
    )
    def test_it_sees_what_runs(self, act, folder):
        act(folder)
        assert WATCH.seen
        WATCH.seen = []
        (folder / "touched").unlink(missing_ok=True)
        sys.modules.pop("evil", None)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_runs(attack, place, folder):
    model = put(PLACES[place], ATTACKS[attack])
    with pytest.raises(UserError, match=r"some\.ckpt") as caught:
        instantiate(BaseModule, model, [], "some.ckpt")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_is_described_is_made():
    model = copy.deepcopy(MODEL)
    made = instantiate(BaseModule, model, [], "some.ckpt")
    assert model == MODEL
    flow = made.flow
    assert (flow.num_classes, flow.length) == (3, 4)
    assert [repr(transform.ordering) for transform in flow.transforms] == [
        "Natural()",
        "Parity(first=1)",
    ]
    assert made.optimization.betas == (0.9, 0.99)
    first, second = (transform.conditioner.backbone for transform in flow.transforms)
    assert first is not second


@pytest.mark.parametrize(
    ("key", "value", "is_right"),
    [
        ("learning_rate", 1, True),
        ("learning_rate", "1e-3", False),
        ("learning_rate", True, False),
        ("base_learning_rate", None, True),
        ("learning_rate", None, False),
        ("warmup_steps", 2.5, False),
        ("schedule", "linear", True),
        ("schedule", "steep", False),
        ("betas", [0.9], False),
        ("betas", [0.9, "0.99"], False),
        ("betas", 0.9, False),
        ("steps", 3, False),
    ],
)
def test_values_are_of_the_type_that_is_expected(key, value, is_right):
    optimization = {**MODEL["init_args"]["optimization"], key: value}
    model = put(PLACES["optimization"], optimization)
    if is_right:
        instantiate(BaseModule, model, [], "some.ckpt")
    else:
        with pytest.raises(UserError, match=rf"some\.ckpt describes no .*optimization.*{key}"):
            instantiate(BaseModule, model, [], "some.ckpt")


MINE = """
from dflows.backbones import LSTM
from dflows.bijections import RankPermutation
from lightning_modules import FlowModule
from torch import nn


class Small(LSTM):
    def __init__(self, *args, activation: type[nn.Module] = nn.ReLU, **kwargs):
        super().__init__(*args, **kwargs)
        self.activation = activation()


def smaller(width: int) -> LSTM:
    return LSTM(width)


def unsaid(width):
    return LSTM(width)


class Module(FlowModule):
    def __init__(self, mine, **kwargs):
        super().__init__(**kwargs)
        self.mine = mine
"""


class TestAllowed:
    @pytest.fixture(autouse=True)
    def mine(self, tmp_path_factory, monkeypatch):
        place = tmp_path_factory.mktemp("mine")
        (place / "mine.py").write_text(MINE, encoding="utf-8")
        monkeypatch.syspath_prepend(place)
        yield
        sys.modules.pop("mine", None)

    def test_packages_must_be_vouched_for(self):
        model = put(PLACES["backbone"], named("mine.Small", width=4))
        expected = r"names the class mine\.Small.*--allow mine if you trust"
        with pytest.raises(UserError, match=expected):
            instantiate(BaseModule, model, ["min", "mine.Smal", "evil"], "some.ckpt")
        assert "mine" not in sys.modules

    @pytest.mark.parametrize(
        "backbone",
        [
            named("mine.Small", width=4),
            named("mine.Small", width=4, activation="torch.nn.GELU"),
            named("mine.smaller", width=4),
        ],
    )
    def test_their_classes_and_functions_are_made(self, backbone):
        made = instantiate(BaseModule, put(PLACES["backbone"], backbone), ["mine"], "some.ckpt")
        assert made.flow.transforms[0].conditioner.backbone.width == 4

    @pytest.mark.parametrize(
        "backbone",
        [
            named("mine.unsaid", width=4),
            named("mine.RankPermutation", num_classes=3),
            named("mine.nn", width=4),
            named("mine.Small", width=4, activation="mine.RankPermutation2"),
            named("mine.Small", width=4, activation="dflows.orderings.Natural"),
            named("mine.Small", width=4, activation=SYSTEM),
        ],
    )
    def test_what_is_not_expected_is_refused(self, backbone, folder):
        with pytest.raises(UserError, match=r"some\.ckpt (describes no|names the class os.system)"):
            instantiate(BaseModule, put(PLACES["backbone"], backbone), ["mine"], "some.ckpt")

    def test_arguments_are_handed_on_to_the_class_it_derives_from(self):
        model = {**MODEL, "class_path": "mine.Module"}
        model["init_args"] = {**MODEL["init_args"], "mine": "a text"}
        assert instantiate(BaseModule, model, ["mine"], "some.ckpt").mine == "a text"

    @pytest.mark.parametrize("text", [CONFIG, "- evil.yaml", "a: b", "*alias"])
    def test_a_text_that_nothing_expects_is_not_left_to_be_parsed(self, text):
        model = {**MODEL, "class_path": "mine.Module"}
        model["init_args"] = {**MODEL["init_args"], "mine": text}
        with pytest.raises(UserError, match="mine is "):
            instantiate(BaseModule, model, ["mine"], "some.ckpt")


def test_torch_s_networks_are_made_with_their_activations():
    layer = named(
        "torch.nn.TransformerEncoderLayer",
        d_model=8,
        nhead=2,
        dim_feedforward=8,
        activation="torch.nn.functional.relu",
        batch_first=True,
        device=None,
        dtype=None,
    )
    masked = named("dflows.backbones.Masked", network=layer, width=8)
    model = put(PLACES["backbone"], masked)
    made = instantiate(BaseModule, model, [], "some.ckpt")
    network = made.flow.transforms[0].conditioner.backbone.network
    assert network.activation is torch.nn.functional.relu


def test_a_description_that_was_changed_anywhere_is_made_or_refused(folder):
    draw = random.Random(0)
    junk = [
        *ATTACKS.values(),
        None,
        True,
        0,
        -1,
        2,
        0.5,
        float("nan"),
        "",
        "x",
        [],
        {},
        [1],
        "levels",
    ]
    refused = []
    for _ in range(300):
        model, part = copy.deepcopy(MODEL), None
        waiting = [model]
        places = []
        while waiting:
            part = waiting.pop()
            keys = part if isinstance(part, dict) else range(len(part))
            places += [(part, key) for key in keys]
            waiting += [part[key] for key in keys if isinstance(part[key], (dict, list))]
        part, key = draw.choice(places)
        part[key] = draw.choice(junk)
        try:
            instantiate(BaseModule, model, [], "some.ckpt")
        except UserError as error:
            refused.append(str(error))
    assert 200 < len(refused) < 300
    assert not any("\n" in message for message in refused)


PARTS = {
    "flow": [
        ("stack", {}),
        ("bipartite", {}),
        ("autoregressive", {"ngram_order": 2}),
        ("strided", {"columns": 2}),
        ("language_model", {}),
    ],
    "backbone": [
        ("LSTM", {"width": 4}),
        ("Transformer", {"width": 4, "heads": 1}),
        ("DilatedConvolution", {"width": 4}),
        ("LevelConvolution", {"width": 4}),
        ("MADE", {"width": 4, "length": 4}),
        ("Table", {"width": 4, "num_classes": 3, "length": 4}),
    ],
    "ordering": [
        ("Strided", {"columns": 2}),
        ("Blocks", {"size": 2}),
        ("CoarseToFine", {"stride": 2}),
    ],
}
SOURCES = {"flow": flows, "backbone": backbones, "ordering": orderings}


def sizes():
    """Returns every number of a part that says how many."""
    found = []
    for place, parts in PARTS.items():
        for name, given in parts:
            made = getattr(SOURCES[place], name)
            for key, parameter in inspect.signature(made).parameters.items():
                if parameter.annotation in (int, int | None):
                    found.append(pytest.param(place, name, given, key, id=f"{name}.{key}"))
    return found


@pytest.mark.parametrize(("place", "name", "given", "key"), sizes())
def test_whatever_is_large_is_made_or_refused_at_once(place, name, given, key, monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda *_: 8 * 10**9)
    description = named(f"{SOURCES[place].__name__}.{name}", **given)
    if place == "flow":
        common = MODEL["init_args"]["flow"]["init_args"]
        taken = inspect.signature(getattr(flows, name)).parameters
        description["init_args"] |= {one: common[one] for one in common if one in taken}
        description["init_args"].setdefault("num_classes", 3)
    description["init_args"][key] = 10**12
    model = put(PLACES[place], description)
    try:
        instantiate(BaseModule, model, [], "some.ckpt")
    except UserError as error:
        refused = str(error)
        assert "\n" not in refused
    else:
        refused = ""
    if key in {"num_classes", "length", "width", "hidden", "layers", "num_transforms"}:
        assert re.search("takes at least|give|overflow|more than", refused)


@pytest.mark.parametrize("key", ["num_classes", "length"])
def test_sizes_beyond_the_memory_are_refused_with_the_memory(key, monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda *_: 8 * 10**9)
    model = put((*PLACES["flow"], "init_args", key), 10**9)
    with pytest.raises(UserError, match=r"takes at least \d+ GB of memory, and there are 8"):
        instantiate(BaseModule, model, [], "some.ckpt")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({1: 2}, "a key that is no text"),
        ([[0] * 1000] * 200, "over 100,000 values"),
        ({str(n): n for n in range(100_000)}, "over 100,000 values"),
        ("x" * 2_000_000, "a text of 2,000,000 characters"),
        (b"bytes", "a bytes"),
    ],
)
def test_what_is_no_description_is_refused(model, reason):
    with pytest.raises(UserError, match=rf"the description in some\.ckpt has {reason}"):
        check_description(BaseModule, model, [], "some.ckpt")


def test_a_nest_is_refused():
    model = []
    for _ in range(100_000):
        model = [model]
    with pytest.raises(UserError, match="nested more than 64 deep"):
        check_description(BaseModule, model, [], "some.ckpt")
    while model:  # which the interpreter cannot free at once
        model = model[0]


class TestData:
    @pytest.mark.parametrize(
        "source",
        [
            named("datamodules.HubText", path="a", data_files="b.txt"),
            named("datamodules.HubText", path="a", data_files=["b.txt", "c.txt"]),
            named("datamodules.HubText", path="a", data_files={"train": "b.txt"}),
            named("datamodules.HubText", path="a", data_files={"train": ["b.txt", "c.txt"]}),
            named("datamodules.LocalText", path=["a: b", "{c: d}"], separator=": "),
        ],
    )
    def test_each_of_several_types_is_taken(self, source):
        check_description(
            StreamDataModule, put(("init_args", "source"), source, DATA), [], "some.ckpt"
        )

    @pytest.mark.parametrize(
        "source",
        [
            named("datamodules.LocalText", path="[/etc/passwd, a]"),
            named("datamodules.LocalText", path="- /etc/passwd"),
            named("datamodules.HubText", path="a", data_files="{train: other.txt}"),
        ],
    )
    def test_a_text_that_would_be_parsed_is_refused(self, source):
        data = put(("init_args", "source"), source, DATA)
        with pytest.raises(UserError, match=r"some\.ckpt"):
            check_description(StreamDataModule, data, [], "some.ckpt")

    @pytest.mark.parametrize("path", ["*.txt", "C:/text.txt", "[a].txt"])
    def test_a_text_that_would_not_be_is_taken(self, path):
        source = named("datamodules.LocalText", path=path)
        check_description(
            StreamDataModule, put(("init_args", "source"), source, DATA), [], "some.ckpt"
        )

    @pytest.mark.parametrize("probabilities", [None, [0.5, 0.5], [[1, 2], [3, 4]]])
    def test_lists_of_lists_are_taken(self, probabilities):
        data = named("datamodules.FullRankDataModule", probabilities=probabilities)
        check_description(StreamDataModule, data, [], "some.ckpt")

    def test_a_description_is_looked_through_and_nothing_is_made(self, folder):
        source = named("datamodules.LocalText", path="evil.yaml")
        data = put(("init_args", "source"), source, DATA)
        check_description(StreamDataModule, data, [], "some.ckpt")

    @pytest.mark.parametrize("place", [(), ("init_args", "source"), ("init_args", "length")])
    @pytest.mark.parametrize("attack", sorted(ATTACKS.keys() - {"a reader of files"}))
    def test_nothing_runs(self, attack, place, folder):
        data = put(place, ATTACKS[attack], DATA)
        with pytest.raises(UserError, match=r"some\.ckpt") as caught:
            check_description(StreamDataModule, data, [], "some.ckpt")
        assert "\n" not in str(caught.value)
