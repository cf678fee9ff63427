"""Two processes train as one does, and end cleanly where their data are uneven."""

import math

import pytest
import torch

from dflows.records import read_record
from tests.commands import run_apart, run_here, small_config, write_text

STEPS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same batches in one process and in two."""
    folders = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        config = small_config(folder, write_text(folder), val_check_interval=2, max_steps=STEPS)
        arguments = ("--config", config, "--data.batch_size", 8 // processes)
        # Clipping would hide gradients of a wrong size.
        arguments += ("--trainer.gradient_clip_val", 0, "--model.base_refit_every", 2)
        # A backbone that runs masked draws levels, other ones in every process.
        arguments += ("--model.flow.backbone", "dflows.backbones.LevelConvolution")
        arguments += ("--model.flow.backbone.width", 8, "--model.flow.backbone.layers", 1)
        if processes == 1:
            assert run_here("fit", *arguments) == 0
        else:
            more = ("--trainer.devices", processes, "--trainer.strategy", "ddp")
            done = run_apart("fit", *arguments, *more, cwd=folder)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "Warning" not in done.stderr
            assert done.stdout.count("test, bits per character") == 1, "one process prints"
        folders[processes] = folder / "runs" / "small" / "version_0"
    return folders


@pytest.fixture(scope="module")
def checkpoints(runs):
    return {n: torch.load(run / "last.ckpt", weights_only=True) for n, run in runs.items()}


def test_gradients_and_weights_are_those_of_one_process(checkpoints):
    one, two = checkpoints[1], checkpoints[2]
    assert one["global_step"] == two["global_step"] == STEPS
    (first,), (second,) = one["optimizer_states"], two["optimizer_states"]
    assert len(first["state"]) > 10
    for index, state in first["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            expected, found = state[name], second["state"][index][name]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-3, atol=1e-5)


def test_the_base_is_refitted_from_the_counts_of_all_processes(checkpoints):
    one, two = (checkpoints[n]["state_dict"]["base_refit.counts"] for n in (1, 2))
    assert one.sum() == pytest.approx(8 * 16 * (1 + 0.99))
    assert torch.equal(one.sum(dim=1), two.sum(dim=1))


def test_metrics_are_those_of_one_process(runs):
    one, two = (read_record(runs[n] / "small-1.json").metrics for n in (1, 2))
    # 300 characters are 18 windows of 16 in batches of 4, and a rest of 12: 6 batches for two.
    assert one["characters"] == two["characters"] == {"valid": 300, "test": 300}
    for name in ("valid_bpc", "test_bpc", "valid_nats", "test_nats"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)
        assert math.isfinite(one[name])
    assert two["residual_bpc"] == pytest.approx(one["residual_bpc"], rel=0.02)


def test_transforms_that_a_process_samples_no_example_for_do_not_stop_the_others(tmp_path):
    config = small_config(tmp_path, write_text(tmp_path), max_steps=STEPS, val_check_interval=STEPS)
    # For the one example that a process has, one of the two transforms is sampled.
    more = ("--model.objective", "dflows.objectives.Local")
    more += ("--model.objective.subsample", "transforms", "--data.batch_size", 1)
    more += ("--trainer.devices", 2, "--trainer.strategy", "ddp")
    done = run_apart("fit", "--config", config, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = read_record(tmp_path / "runs" / "small" / "version_0" / "small-1.json").metrics
    assert metrics["steps"] == STEPS
    assert metrics["characters"] == {"valid": 300, "test": 300}


def test_a_process_without_a_validation_batch_is_not_waited_for(tmp_path):
    more = {"max_steps": STEPS, "val_check_interval": 2}
    config = small_config(tmp_path, write_text(tmp_path), **more)
    # Of a split of one window there is one batch, and buffers that both processes share.
    arguments = ("--data.max_eval_characters", 16, "--data.batch_size", 4)
    arguments += (
        "--model.base_refit_every",
        2,
        "--trainer.devices",
        2,
        "--trainer.strategy",
        "ddp",
    )
    done = run_apart("fit", "--config", config, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = read_record(tmp_path / "runs" / "small" / "version_0" / "small-1.json").metrics
    assert metrics["characters"] == {"valid": 16, "test": 16}


def test_two_processes_that_diverge_both_end(tmp_path):
    config = small_config(tmp_path, write_text(tmp_path), max_steps=STEPS, val_check_interval=STEPS)
    more = ("--trainer.callbacks", "tests.callbacks.Spoil", "--trainer.devices", 2)
    done = run_apart("fit", "--config", config, *more, "--trainer.strategy", "ddp", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the training diverged: a gradient at step 2 is not finite" in done.stderr
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("*-[01].json"))
