"""Wrong uses of the commands: an exit code, one line, soon, and nothing is half-written.

A use is one entry of `USES`. What it needs is made by `prepare` in the folder where the command
runs, which holds the checkpoint of a short run, `best.ckpt`, its configuration, `small.yaml`, and
the text that it was trained on, `odd.txt`.
"""

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.vocabulary import CharacterVocabulary
from dflows import memory
from lightning_modules.checkpoints import KEY
from tests.commands import everything_in, run_here, small_config, write_text

MEMORY = 32 * 10**9
"""Of whatever machine this is."""

SECONDS = 10
"""Of the processor: others may use the machine, too."""


@dataclass(frozen=True)
class Use:
    """A command with its arguments, and what is expected of it.

    Args:
        command: fit, evaluate or generate.
        arguments: Its arguments.
        line: A pattern that the one line of the error holds.
        code: The exit code.
        prepare: Makes what the arguments name, in a folder.
    """

    command: str
    arguments: tuple[Any, ...]
    line: str
    code: int = 1
    prepare: Callable[[Path], Any] = lambda _: None


def bad(change):
    """What writes `bad.ckpt`, the checkpoint with its content changed."""

    def prepare(folder):
        content = torch.load(folder / "best.ckpt", weights_only=True)
        torch.save(change(content) or content, folder / "bad.ckpt")

    return prepare


def at(*keys):
    """What changes one value of the description of `bad.ckpt`."""

    def given(value):
        def change(content):
            part = content[KEY]
            for key in keys[:-1]:
                part = part[key]
            part[keys[-1]] = value

        return bad(change)

    return given


FLOW = ("config", "model", "init_args", "flow")
BACKBONE = at(*FLOW, "init_args", "backbone")
DATA = ("config", "data")
CODE = {"command": "touch touched"}
YAML = "{class_path: os.system, init_args: {command: touch touched}}"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


class Command:
    def __reduce__(self):
        return os.system, ("touch touched",)


def write(name, content):
    def prepare(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def cut(folder):
    whole = (folder / "best.ckpt").read_bytes()
    (folder / "bad.ckpt").write_bytes(whole[: len(whole) // 2])


def flip(folder):
    whole = bytearray((folder / "best.ckpt").read_bytes())
    whole[len(whole) // 3] ^= 16
    (folder / "bad.ckpt").write_bytes(whole)


def widen(content):
    name = next(name for name, value in content["state_dict"].items() if value.ndim == 2)
    content["state_dict"][name] = torch.zeros(3, 5)


def generate(*arguments, line, **options):
    """A wrong use of generation from a checkpoint that is right."""
    return Use("generate", ("--checkpoint", "best.ckpt", *arguments), line, **options)


def evaluate(*arguments, line, **options):
    return Use("evaluate", ("--checkpoint", "best.ckpt", *arguments), line, **options)


def fit(*arguments, line, **options):
    return Use("fit", ("--config", "small.yaml", *arguments), line, **options)


def wrong(prepare, line, command="generate"):
    """A use of a checkpoint that is wrong."""
    return Use(command, ("--checkpoint", "bad.ckpt"), line, prepare=prepare)


CHECKPOINTS = {
    "no checkpoint": Use("generate", (), "checkpoint", code=2),
    "a missing file": wrong(lambda _: None, "no checkpoint bad.ckpt: give the path of a file"),
    "a folder without any": Use("generate", ("--checkpoint", "."), "no best.ckpt and no last", 1,
        lambda folder: (folder / "best.ckpt").rename(folder / "other")),
    "an empty file": wrong(write("bad.ckpt", ""), "bad.ckpt is damaged or no checkpoint of dflows"),
    "a text": wrong(write("bad.ckpt", "text"), "bad.ckpt is damaged or no checkpoint of dflows"),
    "half a file": wrong(cut, "bad.ckpt is damaged or no checkpoint of dflows"),
    "a flipped bit": wrong(flip, "its checksum is another"),
    "code in a pickle": wrong(bad(lambda content: content.update(more=Command())), "is damaged or"),
    "another program's": wrong(bad(lambda _: {"state_dict": {}}), "a checkpoint of something else"),
    "no weights": wrong(bad(lambda content: {KEY: content[KEY]}), "a checkpoint of something else"),
    "another format": wrong(at("format")(2), "has the format 2, and this dflows reads 1"),
    "no description": wrong(at("config")([]), "the description in bad.ckpt is damaged"),
    "no model": wrong(at("config")({}), "describes no BaseModule"),
    "other weights": wrong(bad(widen), "the weights in bad.ckpt do not fit the model"),
    "a vocabulary of another size": wrong(
        at("vocabulary")(CharacterVocabulary("abc").to_json()), "its vocabulary has 3"
    ),
    "a vocabulary that is deep": wrong(at("vocabulary")("[" * 10**5), "no tokenizer.json"),
    "code through a module": wrong(
        BACKBONE({"class_path": "dflows.cli.errors.os.system", "init_args": CODE}),
        "it names dflows.cli.errors.os.system, which is no class that a model is made of",
    ),
    "a package nobody vouched for": wrong(
        BACKBONE({"class_path": "evil.Network"}), "add --allow evil if you trust that"
    ),
    "YAML in a text": wrong(BACKBONE(YAML), "flow.backbone is '{class_path: os.system"),
    "a model in a text": wrong(at("config", "model")(YAML), "it is '{class_path: os.system"),
    "a file for a network": wrong(BACKBONE("evil.yaml"), "flow.backbone is 'evil.yaml'"),
    "an address for a network": wrong(BACKBONE("http://127.0.0.1:1/a"), "backbone is 'http://"),
    "a length of a billion": wrong(at(*FLOW, "init_args", "length")(10**9), "64 GB of memory"),
    "a billion classes": wrong(at(*FLOW, "init_args", "num_classes")(10**9), "GB of memory"),
    "a billion layers": wrong(
        at(*FLOW, "init_args", "backbone", "init_args", "layers")(10**9),
        "layers is 1,000,000,000: give at most 10,000",
    ),
    "data of a foreign class": wrong(
        at(*DATA)({"class_path": "dflows.fit.sys.exit"}), "which is no class", "evaluate"
    ),
    "data in a text": wrong(at(*DATA)(YAML), "it is '{class_path: os.system", "evaluate"),
    "a source in a text": wrong(
        at(*DATA, "init_args", "source")(YAML), "source is '{class_path: os.system", "evaluate"
    ),
    "a source in a file": wrong(
        at(*DATA, "init_args", "source")("evil.yaml"), "source is 'evil.yaml'", "evaluate"
    ),
}  # fmt: skip

GENERATE = {
    "an unknown key": generate("--lenght", 3, line="--lenght", code=2),
    "a number in words": generate("--num_samples", "many", line="num_samples", code=2),
    "no samples": generate("--num_samples", 0, line="num_samples is 0: give at least 1"),
    "too many samples": generate("--num_samples", 10**12, line=r"takes at least [\d,]+ GB"),
    "samples too long": generate("--length", 10**12, line=r"takes at least [\d,]+ GB"),
    "a window of another length": generate("--window", 10**12, line="1000000000000"),
    "other passes": generate("--passes", 10**12, line="1000000000000 passes were asked for"),
    "a negative seed": generate("--seed", -1, line="seed is -1", code=2),
    "a cold sample": generate("--temperature", 0, line="temperature is 0"),
    "no temperature": generate("--temperature", ".nan", line="temperature is nan"),
    "an unknown method": generate("--method", "best", line="method", code=2),
    "an unknown device": generate("--device", "toaster", line="device toaster is not available"),
    "a device that is not there": generate("--device", "cuda:99", line="device cuda:99 is not"),
    "an empty prompt": generate("--prompt", "", line="prompt is empty"),
    "an unknown character": generate("--prompt", "?§", line="'§' .* is not among"),
    "a prompt nobody continues": generate("--prompt", "ß", line="cannot be conditioned on"),
    "a missing draft": generate("--draft", "no.ckpt", line="no checkpoint no.ckpt"),
    "a draft that guesses nothing": generate("--draft", "best.ckpt", line="the draft is a FlowMod"),
}

EVALUATE = {
    "evaluate: no checkpoint": Use("evaluate", (), "no checkpoint is given"),
    "evaluate: an unknown key": evaluate("--data.lenght", 3, line="lenght", code=2),
    "evaluate: the training split": evaluate("--split", "train", line="split", code=2),
    "evaluate: another vocabulary": evaluate("--data.vocabulary", "bytes", line="another vocab"),
    "evaluate: no window": evaluate("--data.length", 0, line="length must be at least 1"),
    "evaluate: too long a window": evaluate("--data.length", 10**12, line="asked for|longer than"),
    "evaluate: no batch": evaluate("--data.eval_batch_size", 0, line="must be at least 1"),
    "evaluate: a million workers": evaluate("--data.num_workers", 10**6, line="at most 1024"),
    "evaluate: a missing text": evaluate(
        "--data.source.init_args.path", "no.txt", line="cannot read no.txt"
    ),
    "evaluate: text that is unknown": evaluate(
        "--data.source.init_args.path",
        "new.txt",
        line="is not among the",
        prepare=write("new.txt", "§" * 99),
    ),
    "evaluate: passes for a stack": evaluate("--passes", 3, line="3 passes were asked for"),
    "evaluate: a name with a folder": evaluate("--name", "../x", line="--name is '../x'"),
    "evaluate: a record in a file": evaluate(
        "--record", "odd.txt", line="no record can be written into odd.txt: .* is a file"
    ),
    "evaluate: a missing config": evaluate("--config", "no.yaml", line="no configuration no.yaml"),
    "evaluate: YAML without end": evaluate(
        "--config", "a.yaml", line="aliases unfold to more than", prepare=write("a.yaml", BOMB)
    ),
    "evaluate: YAML in a circle": evaluate(
        "--config", "a.yaml", line="an alias is inside", prepare=write("a.yaml", "a: &a [*a]")
    ),
    "evaluate: a key twice": evaluate(
        "--config",
        "a.yaml",
        line="there twice",
        prepare=write("a.yaml", "split: test\nsplit: valid"),
    ),
}

FIT = {
    "fit: too many rows to learn from": fit(
        "--data.batch_size", 10**8, line="a training batch of 100,000,000 examples of 16 dim"
    ),
    "fit: too many rows to hold": fit(
        "--data.batch_size", 10**12, line=r"takes at least [\d,]+ GB"
    ),
    "fit: a window beyond the text": fit("--data.length", 10**12, line="is longer than the 2400"),
    "fit: a billion layers": fit(
        "--model.flow.backbone.init_args.layers", 10**9, line="layers is 1,000,000,000: give at mo"
    ),
    "fit: an endless width": fit(
        "--model.flow.backbone.init_args.width", 10**12, line=r"takes at least [\d,]+ GB"
    ),
    "fit: code in a resumed checkpoint": fit(
        "--ckpt_path",
        "bad.ckpt",
        line="is damaged or no checkpoint",
        prepare=bad(lambda content: content.update(more=Command())),
    ),
    "fit: YAML without end": fit(
        "--config", "a.yaml", line="aliases unfold to more than", prepare=write("a.yaml", BOMB)
    ),
}

USES = {**CHECKPOINTS, **GENERATE, **EVALUATE, **FIT}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder with the checkpoint of a short run and its text, as files alone."""
    folder, alone = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("alone")
    text = write_text(folder)
    config = small_config(folder, text.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_here("fit", "--config", config) == 0
    for file in (folder / "runs" / "small" / "version_0" / "best.ckpt", text, config):
        shutil.copy(file, alone)
    return alone


def contents(folder):
    return {
        name: (folder / name).read_bytes() if (folder / name).is_file() else None
        for name in everything_in(folder)
    }


@pytest.mark.parametrize("name", USES)
def test_it_is_refused_in_one_line(name, trained, tmp_path, monkeypatch, capsys):
    use = USES[name]
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "total_memory", lambda *_: MEMORY)
    use.prepare(tmp_path)
    before, begin = contents(tmp_path), time.process_time()
    capsys.readouterr()
    code = run_here(use.command, *use.arguments)
    took, printed = time.process_time() - begin, capsys.readouterr()
    assert code == use.code
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert re.match(rf"error: .*{use.line}", line)
    assert len(line) < 2000
    assert took < SECONDS
    assert contents(tmp_path) == before


def test_there_are_as_many_as_were_asked_for():
    assert len(USES) >= 60
