"""Two processes train as one does, and end cleanly where their data are uneven."""

import math

import pytest
import torch

from dflows.records import read_record
from tests.commands import run_apart, run_here, small_config, write_text

STEPS, ROWS = 4, 12


def settings(folder, processes=1, strategy="ddp"):
    """A run of the same batches in any number of processes."""
    config = small_config(folder, write_text(folder), val_check_interval=2, max_steps=STEPS)
    # Clipping would hide gradients of a wrong size.
    arguments = ("--config", config, "--trainer.gradient_clip_val", 0)
    # A backbone that runs masked draws levels, other ones in every process.
    arguments += ("--model.flow.backbone", "dflows.backbones.LevelConvolution")
    arguments += ("--model.flow.backbone.width", 8, "--model.flow.backbone.layers", 1)
    arguments += ("--data.batch_size", ROWS // processes)
    if processes > 1:
        arguments += ("--trainer.devices", processes, "--trainer.strategy", strategy)
    return arguments


def fit(folder, *arguments, code=0):
    done = run_apart("fit", *arguments, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def last_of(folder):
    return torch.load(folder / "runs" / "small" / "version_0" / "last.ckpt", weights_only=True)


class Runs:
    """The same batches in processes of several numbers and strategies, each run when needed."""

    def __init__(self, factory):
        self._factory = factory
        self._folders = {}

    def __call__(self, processes, strategy="ddp"):
        if (processes, strategy) not in self._folders:
            folder = self._factory.mktemp(f"processes{processes}")
            arguments = (*settings(folder, processes, strategy), "--model.base_refit_every", 2)
            if processes == 1:
                assert run_here("fit", *arguments) == 0
            else:
                done = fit(folder, *arguments)
                if strategy == "ddp":  # the other tells that it found nothing unused
                    assert "Warning" not in done.stderr
                assert done.stdout.count("test, bits per character") == 1, "one process prints"
            self._folders[processes, strategy] = folder / "runs" / "small" / "version_0"
        return self._folders[processes, strategy]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory)


SEVERAL = [
    (2, "ddp"),
    pytest.param(3, "ddp", marks=pytest.mark.slow),
    pytest.param(2, "ddp_find_unused_parameters_true", marks=pytest.mark.slow),
    pytest.param(3, "ddp_find_unused_parameters_true", marks=pytest.mark.slow),
]
several = pytest.mark.parametrize(("processes", "strategy"), SEVERAL)


def checkpoint(run):
    return torch.load(run / "last.ckpt", weights_only=True)


def assert_trained_alike(one, several):
    """Compares weights, gradients by their means, learning rates and the loss of two runs."""
    assert one["global_step"] == several["global_step"]
    (first,), (second,) = one["optimizer_states"], several["optimizer_states"]
    assert len(first["state"]) > 10
    for index, state in first["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            expected, found = state[name], second["state"][index][name]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(several["state_dict"][name], weight, rtol=1e-3, atol=1e-5)
    rates = [[group["lr"] for group in state["param_groups"]] for state in (first, second)]
    assert rates[0] == rates[1]
    for key in ("last_epoch", "_last_lr", "base_lrs"):
        assert several["lr_schedulers"][0][key] == one["lr_schedulers"][0][key]
    smoothed = [state["training"]["train_bpc"] for state in (one, several)]
    torch.testing.assert_close(*smoothed, rtol=1e-4, atol=0)


@several
def test_gradients_weights_and_rates_are_those_of_one_process(runs, processes, strategy):
    one, other = checkpoint(runs(1)), checkpoint(runs(processes, strategy))
    assert one["global_step"] == STEPS
    assert_trained_alike(one, other)


@several
def test_the_base_is_refitted_from_the_counts_of_all_processes(runs, processes, strategy):
    both = (checkpoint(run)["state_dict"] for run in (runs(1), runs(processes, strategy)))
    one, other = (state["base_refit.counts"] for state in both)
    assert one.sum() == pytest.approx(ROWS * 16 * (1 + 0.99))
    torch.testing.assert_close(other.sum(dim=1), one.sum(dim=1))


@several
def test_metrics_are_those_of_one_process(runs, processes, strategy):
    both = (runs(1), runs(processes, strategy))
    one, two = (read_record(run / "small-1.json").metrics for run in both)
    # 300 characters are 18 windows of 16 in batches of 4, and a rest of 12: 6 batches to share.
    assert one["characters"] == two["characters"] == {"valid": 300, "test": 300}
    for name in ("valid_bpc", "test_bpc", "valid_nats", "test_nats"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)
        assert math.isfinite(one[name])
    assert two["steps"] == one["steps"] == STEPS
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


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_process_without_a_validation_batch_is_not_waited_for(processes, tmp_path):
    # Of a split of one window there is one batch, and buffers that all processes share.
    more = ("--data.max_eval_characters", 16, "--model.base_refit_every", 2)
    fit(tmp_path, *settings(tmp_path, processes), *more)
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


STOP = (
    *("--trainer.callbacks", "tests.callbacks.Send", "--trainer.callbacks.number", 15),
    *("--trainer.callbacks.step", 2, "--trainer.callbacks.hook", "on_train_batch_start"),
)
# Weights are dropped, levels drawn: all randomness there is in a step. Gradients wait for more.
RANDOM = ("--model.flow.backbone.dropout", 0.2, "--trainer.accumulate_grad_batches", 2)
RANDOM += ("--model.objective", "dflows.objectives.Local", "--model.base_refit_every", 3)


def test_two_processes_that_stop_go_on_bit_for_bit(tmp_path):
    found = []
    for name, parts in (("whole", [()]), ("stopped", [STOP, None])):
        folder = tmp_path / name
        folder.mkdir()
        arguments = (*settings(folder, 2), *RANDOM)
        for more in parts:
            resumes = more is None
            more = ("--ckpt_path", folder / "runs" / "small" / "version_0") if resumes else more
            fit(folder, *arguments, *more, code=143 if more is STOP else 0)
        run = folder / "runs" / "small" / "version_0"
        found.append((last_of(folder), read_record(run / "small-1.json").metrics))
    (whole, expected), (resumed, metrics) = found
    assert resumed["global_step"] == whole["global_step"] == STEPS
    for name, weight in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight), name
    assert torch.equal(resumed["training"]["train_bpc"], whole["training"]["train_bpc"])
    for name in ("valid_bpc", "test_bpc", "steps", "characters"):
        assert metrics[name] == expected[name], name


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_processes_goes_on_with_the_same_rows(runs, before, after, tmp_path):
    refit = ("--model.base_refit_every", 2)
    fit(tmp_path, *settings(tmp_path, before), *refit, *STOP, code=143)
    resume = ("--ckpt_path", tmp_path / "runs" / "small" / "version_0")
    fit(tmp_path, *settings(tmp_path, after), *refit, *resume)
    assert_trained_alike(checkpoint(runs(1)), last_of(tmp_path))


KEYS = {
    "accumulated": ("--trainer.accumulate_grad_batches", 2),
    "clipped by norm": ("--trainer.gradient_clip_val", 0.01),
    "clipped by value": (
        *("--trainer.gradient_clip_val", 0.001, "--trainer.gradient_clip_algorithm", "value"),
    ),
    "64-true": ("--trainer.precision", "64-true"),
    "gradient checkpointing": ("--model.optimization.gradient_checkpointing", "true"),
    "compiled": ("--model.optimization.compile", "true"),
    "both": (
        *("--model.optimization.gradient_checkpointing", "true"),
        *("--model.optimization.compile", "true", "--trainer.precision", "64-true"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_keys_of_training_do_the_same_in_two_processes(key, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders, start=1):
        folder.mkdir()
        fit(folder, *settings(folder, number), *KEYS[key])
    one, two = map(last_of, folders)
    assert_trained_alike(one, two)
    assert not [name for name in two["state_dict"] if "_orig_mod" in name]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_two_processes_train_and_resume_in_half_precision(precision, tmp_path):
    """Bits depend on how rows are shared out, so that two are compared with themselves."""
    more = ("--trainer.precision", precision)
    if precision == "16-mixed":
        plugin = "pytorch_lightning.plugins.MixedPrecision"
        more = ("--trainer.plugins", plugin, "--trainer.plugins.precision", precision)
        more += ("--trainer.plugins.device", "cpu")
    found = []
    for name, parts in (("whole", [()]), ("stopped", [STOP, None])):
        folder = tmp_path / name
        folder.mkdir()
        for part in parts:
            resume = ("--ckpt_path", folder / "runs" / "small" / "version_0")
            arguments = (*settings(folder, 2), *more, *(resume if part is None else part))
            fit(folder, *arguments, code=143 if part is STOP else 0)
        found.append(last_of(folder))
    whole, resumed = found
    for name, weight in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight), name
    assert resumed.get("MixedPrecision") == whole.get("MixedPrecision")
    assert ("MixedPrecision" in whole) == (precision == "16-mixed")
