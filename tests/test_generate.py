"""``python -m dflows.generate`` from a checkpoint alone."""

import shutil
from functools import partial

import pytest
import torch

from datamodules.vocabulary import IntegerVocabulary
from dflows.backbones import LSTM
from dflows.cli.checkpoints import KEY, describe_run, load_model, read_checkpoint
from dflows.generate import draw
from dflows.orderings import Parity
from lightning_modules import FlowModule
from tests.commands import ODD, run_apart, run_here, small_config, write_text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint away from everything that its run left."""
    folder = tmp_path_factory.mktemp("generate")
    assert run_here("fit", "--config", small_config(folder, write_text(folder))) == 0
    alone = tmp_path_factory.mktemp("alone") / "model.ckpt"
    shutil.copy(folder / "runs" / "small" / "version_0" / "best.ckpt", alone)
    shutil.rmtree(folder)
    return alone


def generated(capsys, *arguments):
    assert run_here("generate", *arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("length", [1, 7, 16, 17, 40])
def test_samples_have_the_length_that_was_asked_for(checkpoint, length, capsys):
    more = ("--num_samples", 1, "--length", length)
    text = generated(capsys, "--checkpoint", checkpoint, *more)
    assert len(text) == length + 1
    assert set(text[:-1]) <= set(ODD)


def test_a_seed_gives_a_sample_and_both_methods_give_the_same(checkpoint, capsys):
    arguments = ("--checkpoint", checkpoint, "--length", 40)
    first = generated(capsys, *arguments, "--seed", 3)
    assert generated(capsys, *arguments, "--seed", 3) == first
    assert generated(capsys, *arguments, "--seed", 3, "--method", "fixed_point") == first
    assert generated(capsys, *arguments, "--seed", 4) != first


def test_long_samples_are_windows_drawn_independently(checkpoint):
    module = load_model(read_checkpoint(checkpoint))
    samples = draw(module, 300, 40, 16, seed=1)
    assert samples.shape == (300, 40)
    generator = torch.Generator().manual_seed(1)
    windows = [module.sample(n, generator=generator) for n in (256, 256, 88)]
    assert torch.equal(samples[:, :32], torch.cat(windows).reshape(300, 32))
    rest = [module.sample(n, length=8, generator=generator) for n in (256, 44)]
    assert torch.equal(samples[:, 32:], torch.cat(rest))


def test_a_conditional_model_is_refused(tmp_path, capsys):
    init_args = {
        "num_classes": 3,
        "length": 4,
        "orderings": ["dflows.orderings.Parity"],
        "backbone": {"class_path": "dflows.backbones.LSTM", "init_args": {"width": 4}},
        "context_features": 2,
    }
    model = {"class_path": "lightning_modules.FlowModule", "init_args": init_args}
    module = FlowModule(3, 4, [Parity()], partial(LSTM, width=4), context_features=2)
    described = describe_run({"model": model, "data": {}}, IntegerVocabulary(3).to_json(), 4)
    path = tmp_path / "some.ckpt"
    torch.save({"state_dict": module.state_dict(), KEY: described}, path)
    assert run_here("generate", "--checkpoint", path) == 1
    assert capsys.readouterr().err == (
        f"error: the model in {path} is conditional, and this command has no context to give it: "
        "draw with flow(context).sample() in Python\n"
    )


def test_a_low_temperature_repeats_itself(checkpoint, capsys):
    arguments = ("--checkpoint", checkpoint, "--temperature", 0.001, "--num_samples", 2)
    text = generated(capsys, *arguments)[:-1]
    assert text[:16] == text[17:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num_samples", 0), "num_samples is 0: give at least 1"),
        (("--length", 0), "length is 0: give at least 1"),
        (("--temperature", 0), "temperature is 0.0: give a positive number"),
        (("--seed", -1), "seed is -1: give at least 0"),
        (("--device", "nonsense"), "device nonsense cannot be had"),
    ],
)
def test_what_cannot_be_had_is_refused_on_one_line(checkpoint, arguments, message, capsys):
    assert run_here("generate", "--checkpoint", checkpoint, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_method_that_there_is_not_is_a_usage_error(checkpoint, capsys):
    assert run_here("generate", "--checkpoint", checkpoint, "--method", "magic") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "method" in line


def test_no_checkpoint_is_a_usage_error(capsys):
    assert run_here("generate") == 2
    assert capsys.readouterr().err == "error: the following arguments are required: checkpoint\n"


OWN_MODULE = """
import torch
from torch import nn

from lightning_modules import BaseModule


class Unigram(BaseModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(classes))

    def objective(self, batch):
        return self.log_prob(batch)

    def log_prob(self, batch):
        return self.logits.log_softmax(-1)[self.indices_of(batch)].sum(-1)

    def sample(self, num_samples, *, length=None, temperature=1.0, generator=None, method="levels"):
        shape = (num_samples, len(self.logits))
        probs = (self.logits / temperature).softmax(-1).expand(shape)
        return torch.multinomial(probs, length or 8, replacement=True, generator=generator)
"""


def test_a_module_of_the_users_own_works_from_its_checkpoint(tmp_path):
    # Its constructor takes neither num_classes nor length.
    (tmp_path / "own_module.py").write_text(OWN_MODULE, encoding="utf-8")
    (tmp_path / "text.txt").write_text("abcabdabe" * 40, encoding="utf-8")
    (tmp_path / "own.yaml").write_text(
        """
        model: {class_path: own_module.Unigram, init_args: {classes: 5}}
        data:
          class_path: datamodules.TextDataModule
          init_args:
            source:
              class_path: datamodules.LocalText
              init_args: {train: text.txt, valid: text.txt, test: text.txt}
            length: 16
        trainer: {accelerator: cpu, max_steps: 2, val_check_interval: 2}
        """,
        encoding="utf-8",
    )
    fitted = run_apart("fit", "--config", "own.yaml", cwd=tmp_path)
    assert fitted.returncode == 0, fitted.stderr
    asked = ("--checkpoint", "runs/own/version_0", "--allow", "own_module")
    generated = run_apart("generate", *asked, "--num_samples", "1", cwd=tmp_path)
    assert generated.returncode == 0, generated.stderr
    assert len(generated.stdout.rstrip("\n")) == 16
    evaluated = run_apart("evaluate", *asked, cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "360 characters" in evaluated.stdout
