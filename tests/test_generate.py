"""``python -m dflows.generate`` from a checkpoint alone."""

import shutil

import pytest
import torch

from dflows.cli.checkpoints import load_model, read_checkpoint
from dflows.generate import draw
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
