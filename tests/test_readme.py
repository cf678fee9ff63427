"""What the README shows runs as it stands there."""

import importlib
import re
import shlex

import pytest
import yaml

from dflows.errors import UserError
from experiments.reproduce import EXPERIMENTS
from tests.commands import ROOT, run_apart, run_here, write_text

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def command_lines():
    lines = "\n".join(blocks("bash")).splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if " -m " in line]
    return [(words[2].partition(".")[2], words[3:]) for words in commands]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_the_library_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flow, training, loading = (part for part in blocks("python") if "nn.Module" not in part)
    names = {}
    exec(flow, names)
    assert names["flow"].sample((4,)).shape == (4, 8)
    assert all(parameter.grad is not None for parameter in names["flow"].parameters())
    exec(training, names)
    assert names["trainer"].global_step == 3
    with pytest.raises(UserError, match="no checkpoint runs/quickstart"):
        exec(loading, names)


def test_the_backbone_of_one_s_own_trains_in_a_few_pass_flow(tmp_path):
    (backbone,) = (block for block in blocks("python") if "nn.Module" in block)
    (config,) = blocks("yaml")
    (tmp_path / "my_package.py").write_text(backbone, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(config, encoding="utf-8")
    source = {"class_path": "datamodules.LocalText", "init_args": {"path": "odd.txt"}}
    short = {
        "data": {"init_args": {"source": source, "batch_size": 2}},
        "trainer": {"max_steps": 2, "val_check_interval": 1},
    }
    write_text(tmp_path)
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short), encoding="utf-8")
    configs = ("--config", "text/few-pass.yaml", "--config", "mine.yaml", "--config", "short.yaml")
    done = run_apart("fit", *configs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test, bits per character" in done.stdout


@pytest.mark.parametrize(
    ("choice", "module", "interface"),
    [
        ("bijection", "bijections", {"Bijection", "SoftmaxBijection"}),
        (
            "gradient rule",
            "gradients",
            {"ExampleWeights", "GradientRule", "example_weights", "gumbel_like"},
        ),
        ("ordering", "orderings", {"Ordering", "alike", "untransformed"}),
        (
            "backbone",
            "backbones",
            {"Backbone", "Masked", "State", "StatefulBackbone", "SteppedBackbone", "as_backbone"},
        ),
        ("base", "bases", {"Base", "ClosedFormBase"}),
        ("objective", "objectives", {"Objective"}),
    ],
)
def test_the_choices_have_the_members_that_are_exported(choice, module, interface):
    (row,) = re.findall(rf"^\| {choice} \|.*$", README, flags=re.MULTILINE)
    members = re.findall(r"`(\w+)`", row)
    exported = set(importlib.import_module(f"dflows.{module}").__all__)
    assert interface < exported
    assert sorted(members) == sorted(exported - interface)


@pytest.mark.parametrize(("command", "arguments"), command_lines())
def test_the_commands_are_taken(command, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if command == "reproduce":
        # tests/experiments/test_reproduce.py runs it.
        assert arguments[0] in EXPERIMENTS
        assert arguments[1:] == ["--smoke"]
    elif command == "fit":
        (tmp_path / "mine.yaml").write_text("name: mine\n", encoding="utf-8")
        arguments = [*arguments, "--print_config"]
        assert run_here(command, *arguments) == 0
        assert "class_path: lightning_modules.FlowModule" in capsys.readouterr().out
    else:
        # All that is missing is the run itself.
        assert run_here(command, *arguments) == 1
        assert "no checkpoint runs/quickstart" in capsys.readouterr().err
