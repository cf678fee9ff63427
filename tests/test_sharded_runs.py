"""Runs by fsdp: their checkpoints and records are those of any run, and they go on in any way."""

import shutil

import pytest
import torch

import dflows
from dflows.records import read_record
from lightning_modules.archives import check_archive
from tests.commands import run_apart, run_here, small_config, write_text

FSDP = ("--trainer.devices", 2, "--trainer.strategy", "fsdp")
DDP = ("--trainer.devices", 2, "--trainer.strategy", "ddp")


def train(folder, *arguments, steps=4):
    """Trains in a folder of its own, and returns that of the run."""
    folder.mkdir(exist_ok=True)
    config = small_config(folder, write_text(folder), max_steps=steps, val_check_interval=2)
    batch = 4 if "--trainer.devices" in arguments else 8
    more = ("--data.batch_size", batch, "--model.optimization.schedule", "constant")
    # It draws nothing in a step, which would differ with the number of processes, and has no
    # stages, which end with the run.
    more += ("--model.objective", "dflows.objectives.Local")
    more += ("--model.flow.backbone", "dflows.backbones.LevelConvolution")
    more += ("--model.flow.backbone.width", 8, "--model.flow.backbone.layers", 1)
    done = run_apart("fit", "--config", config, *more, *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert done.stdout.count("test, bits per character") == 1, "one process prints"
    assert done.stdout.count("sample ─") == 1
    return folder / "runs" / "small" / "version_0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("fsdp"), *FSDP, "--model.base_refit_every", 2)


def last(run):
    return torch.load(run / "last.ckpt", weights_only=True)


def tensors(content):
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors(part)


def test_its_checkpoints_are_those_of_one_process(run):
    for name in ("best.ckpt", "last.ckpt"):
        check_archive(run / name)
        content = torch.load(run / name, weights_only=True)
        assert {type(tensor) for tensor in tensors(content)} == {torch.Tensor}
        module = dflows.load(run / name).module
        (state,) = content["optimizer_states"]
        shapes = {state["exp_avg"].shape for state in state["state"].values()}
        assert shapes <= {parameter.shape for parameter in module.parameters()}


def test_one_process_evaluates_it_to_the_same_figures(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--checkpoint", run / "best.ckpt", "--record", tmp_path, "--name", "again")
    assert run_here("evaluate", *arguments) == 0
    found = read_record(tmp_path / "again-1.json").metrics
    expected = read_record(run / "small-1.json").metrics
    assert expected["steps"] == 4
    for name in ("test_bpc", "test_nats", "characters", "residual_bpc"):
        assert found[name] == pytest.approx(
            expected[name] if name != "characters" else {"test": 300}
        )


def test_it_generates(run, capsys):
    assert run_here("generate", "--checkpoint", run, "--length", 32) == 0
    assert capsys.readouterr().out


def test_its_precision_and_devices_are_recorded(run):
    assert read_record(run / "small-1.json").device.startswith("2 x ")


WAYS = {"fsdp": FSDP, "ddp": DDP, "one": ()}


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Runs of half the steps."""
    folder = tmp_path_factory.mktemp("halves")
    return {name: train(folder / name, *way, steps=2) for name, way in WAYS.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return last(train(tmp_path_factory.mktemp("whole"), *FSDP))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [("fsdp", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp"), ("fsdp", "one"), ("one", "fsdp")],
)
def test_it_goes_on_as_if_it_had_not_ended(tmp_path, halves, uninterrupted, before, after):
    run = tmp_path / "runs" / "small" / "version_0"
    shutil.copytree(halves[before], run)
    found = last(train(tmp_path, *WAYS[after], "--ckpt_path", run / "last.ckpt"))
    assert found["global_step"] == 4
    tolerance = {"rtol": 0, "atol": 0} if before == after else {"rtol": 1e-3, "atol": 1e-5}
    for name, value in uninterrupted["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, **tolerance)
