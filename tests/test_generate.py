"""``python -m dflows.generate`` from a checkpoint alone."""

import re
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import dflows
from datamodules.vocabulary import CharacterVocabulary, IntegerVocabulary
from dflows import Context, NGramBase, acceleration, flows
from dflows.backbones import LSTM
from dflows.cli.checkpoints import describe_run, load_model, read_checkpoint
from dflows.cli.trained import draw
from dflows.errors import UserError
from dflows.orderings import Parity
from lightning_modules import FlowModule, LanguageModel, NGramModule
from lightning_modules.checkpoints import KEY
from tests.commands import ODD, run_here, small_config, write_text


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
        "orderings": [{"class_path": "dflows.orderings.Parity"}],
        "backbone": {"class_path": "dflows.backbones.LSTM", "init_args": {"width": 4}},
        "context": {"features": 2},
    }
    made = {"class_path": "dflows.flows.stack", "init_args": init_args}
    model = {"class_path": "lightning_modules.FlowModule", "init_args": {"flow": made}}
    flow = flows.stack(3, 4, [Parity()], partial(LSTM, width=4), context=Context(2))
    module = FlowModule(flow)
    described = describe_run({"model": model, "data": {}}, IntegerVocabulary(3).to_json(), 4)
    path = tmp_path / "some.ckpt"
    torch.save({"state_dict": module.state_dict(), KEY: described}, path)
    assert run_here("generate", "--checkpoint", path) == 1
    assert capsys.readouterr().err == (
        f"error: the model in {path} is conditional, and this command has no context to give it: "
        "use dflows.load(path).sample(context=context) in Python\n"
    )


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A checkpoint of an LSTM over windows of 16."""
    folder = tmp_path_factory.mktemp("language-model")
    module = LanguageModel(flows.language_model(len(ALPHABET), 16, partial(LSTM, width=8)))
    init_args = {
        "num_classes": len(ALPHABET),
        "length": 16,
        "backbone": {"class_path": "dflows.backbones.LSTM", "init_args": {"width": 8}},
    }
    made = {"class_path": "dflows.flows.language_model", "init_args": init_args}
    model = {"class_path": "lightning_modules.LanguageModel", "init_args": {"flow": made}}
    vocabulary = CharacterVocabulary(ALPHABET).to_json()
    described = describe_run({"model": model, "data": {}}, vocabulary, 16)
    path = folder / "model.ckpt"
    torch.save({"state_dict": module.state_dict(), KEY: described}, path)
    return path


ALPHABET = "abcdefgh"


@pytest.mark.parametrize("length", [5, 16, 20, 40])
def test_samples_begin_with_the_prompt(language_model, length, capsys):
    arguments = ("--checkpoint", language_model, "--length", length, "--prompt", "badge")
    first = generated(capsys, *arguments)
    lines = first.splitlines()
    assert [len(line) for line in lines] == [length] * 4
    assert all(line.startswith("badge") for line in lines)
    assert length == 5 or len(set(lines)) == 4
    assert generated(capsys, *arguments, "--method", "fixed_point") == first
    if length > 16:
        assert all(line[16:21] != "badge" for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "bat"), "the prompt, line 1, column 3: 't' (U+0074) is not among"),
        (("--prompt", ""), "prompt is empty: give at least one character"),
        (
            ("--prompt", "badge", "--length", 4),
            "the prompt has 5 characters, and samples have 4: give a shorter prompt, or a greater",
        ),
        (
            ("--prompt", "a" * 17, "--length", 40),
            "the prompt has 17 characters, and the model draws 16 at once: give a shorter prompt",
        ),
        (("--cuda_graph", "--device", "cpu"), "cuda_graph is set, and the model is on cpu"),
    ],
)
def test_what_no_language_model_can_do_is_refused(language_model, arguments, message, capsys):
    assert run_here("generate", "--checkpoint", language_model, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_prompt_is_refused_where_it_cannot_be_conditioned_on(checkpoint, capsys):
    assert run_here("generate", "--checkpoint", checkpoint, "--prompt", ODD[:5]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a prompt of 5 dimensions cannot be conditioned on exactly: in ")
    assert "over Strided(columns=3)" in line


def test_the_iterations_of_the_fixed_point_are_told(language_model, capsys):
    arguments = ("--checkpoint", language_model, "--num_samples", 300, "--method", "fixed_point")
    assert run_here("generate", *arguments) == 0
    error = capsys.readouterr().err
    found = re.fullmatch(r"the fixed point took (\S+) iterations a batch; .* is 16\n", error)
    assert 1 <= float(found[1]) <= 17


def n_grams(path, alphabet=ALPHABET, length=16):
    """Writes the checkpoint of an n-gram model."""
    module = NGramModule(len(alphabet), length, order=3)
    module.flow.base.count([torch.arange(200) ** 2 % len(alphabet)])
    init_args = {"num_classes": len(alphabet), "length": length, "order": 3}
    model = {"class_path": "lightning_modules.NGramModule", "init_args": init_args}
    vocabulary = CharacterVocabulary(alphabet).to_json()
    described = describe_run({"model": model, "data": {}}, vocabulary, length)
    torch.save({"state_dict": module.state_dict(), KEY: described}, path)
    return path


@pytest.mark.parametrize("more", [(), ("--prompt", "badge"), ("--temperature", 0.2)])
def test_a_draft_changes_no_sample(language_model, more, tmp_path, capsys):
    arguments = ("--checkpoint", language_model, "--length", 40, *more)
    first = generated(capsys, *arguments)
    drafted = ("--method", "fixed_point", "--draft", n_grams(tmp_path / "draft.ckpt"))
    assert run_here("generate", *arguments, *drafted) == 0
    captured = capsys.readouterr()
    assert captured.out == first
    assert "iterations a batch" in captured.err


def test_a_draft_goes_with_a_model_in_python(language_model, tmp_path):
    model, draft = dflows.load(language_model), dflows.load(n_grams(tmp_path / "draft.ckpt"))
    expected = model.sample(3, seed=2, length=20)
    assert model.sample(3, seed=2, length=20, method="fixed_point", draft=draft) == expected


def test_a_draft_is_refused_by_what_takes_none():
    module = SimpleNamespace(device="cpu", takes_draft=False)
    with pytest.raises(UserError, match="a draft was given, and a SimpleNamespace takes none"):
        draw(module, 1, 4, 4, draft=NGramBase(3, 4))


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (
            n_grams,
            "levels",
            "a draft was given and method is 'levels', which guesses nothing: give",
        ),
        (
            partial(n_grams, alphabet="abcdefghi"),
            "fixed_point",
            "the draft has another vocabulary of 9 classes than the model with its 8: give n-grams",
        ),
        (
            partial(n_grams, alphabet="hgfedcbx"),
            "fixed_point",
            "the draft has another vocabulary of 8 classes than the model with its 8: give n-grams",
        ),
        (
            partial(n_grams, length=8),
            "fixed_point",
            "the draft has length 8, and the flow 16: give",
        ),
        (None, "fixed_point", "the draft, AutoregressiveBase, guesses nothing without a network"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(
    language_model, make, method, message, tmp_path, capsys
):
    draft = language_model if make is None else make(tmp_path / "draft.ckpt")
    arguments = ("--checkpoint", language_model, "--method", method, "--draft", draft)
    assert run_here("generate", *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_draft_is_a_base_alone_under_a_base_with_a_network(checkpoint, tmp_path, capsys):
    draft = n_grams(tmp_path / "draft.ckpt")
    asked = ("--method", "fixed_point", "--draft")
    assert run_here("generate", "--checkpoint", draft, *asked, draft) == 1
    assert capsys.readouterr().err == (
        "error: a draft was given, and NGramBase is sampled without a network: leave the draft "
        "away\n"
    )
    assert run_here("generate", "--checkpoint", draft, *asked, checkpoint) == 1
    assert capsys.readouterr().err == (
        "error: the draft is a FlowModule, and no base alone: give an NGramModule\n"
    )


def test_compiled_samples_are_the_same(language_model, capsys, monkeypatch):
    monkeypatch.setattr(acceleration, "BACKEND", "eager")
    arguments = ("--checkpoint", language_model, "--prompt", "a", "--length", 20)
    assert generated(capsys, *arguments, "--compile") == generated(capsys, *arguments)


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
        (("--device", "nonsense"), "device nonsense is not available"),
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


@pytest.mark.parametrize("seed", ["1" * 20, -1])
def test_a_seed_that_is_none_is_a_usage_error(checkpoint, seed, capsys):
    assert run_here("generate", "--checkpoint", checkpoint, "--seed", seed) == 2
    assert capsys.readouterr().err == f"error: seed is {seed}: give a number from 0 to 4294967295\n"


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

    def evaluate_objective(self, batch):
        return self.log_prob(batch)

    def log_prob(self, batch):
        return self.logits.log_softmax(-1)[self.indices_of(batch)].sum(-1)

    def sample(self, num_samples, *, length=None, temperature=1.0, generator=None, method="levels"):
        shape = (num_samples, len(self.logits))
        probs = (self.logits / temperature).softmax(-1).expand(shape)
        return torch.multinomial(probs, length or 8, replacement=True, generator=generator)
"""


def test_a_module_of_the_users_own_works_from_its_checkpoint(tmp_path, monkeypatch, capsys):
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    assert run_here("fit", "--config", "own.yaml") == 0
    asked = ("--checkpoint", "runs/own/version_0", "--allow", "own_module")
    capsys.readouterr()
    assert run_here("generate", *asked, "--num_samples", "1") == 0
    assert len(capsys.readouterr().out.rstrip("\n")) == 16
    for arguments, line in (
        (("--prompt", "ab"), "error: a prompt was given, and a Unigram takes none: leave it away"),
        (
            ("--method", "fixed_point", "--draft", "runs/own/version_0"),
            "error: the draft is a Unigram, and no base alone: give an",
        ),
        (("--compile",), "error: compile is set, and a Unigram is computed in one way"),
    ):
        assert run_here("generate", *asked, *arguments) == 1
        assert capsys.readouterr().err.startswith(line)
    assert run_here("evaluate", *asked) == 0
    assert "360 characters" in capsys.readouterr().out
