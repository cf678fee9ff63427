"""A run that is killed and resumed is the uninterrupted one; one that is interrupted says so."""

import multiprocessing
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
import yaml

from dflows.records import read_record
from tests.commands import (
    command_line,
    environment,
    everything_in,
    run_here,
    small_config,
    write_text,
)

FORK = multiprocessing.get_context("fork")
STEPS = 12
# A level is drawn an example and step, and weights are dropped: all randomness there is in a step.
MORE = (
    *("--model.objective", "dflows.objectives.Local", "--model.objective.subsample", "levels"),
    *("--model.flow.backbone.dropout", "0.2", "--model.base_refit_every", "3"),
    *("--last_checkpoint.every_n_train_steps", "5", "--trainer.limit_test_batches", "1"),
)


def start(folder, config, *arguments):
    line = command_line("fit", "--config", config, *MORE, *arguments)
    # A shell has its background jobs ignore Ctrl-C, which what they start would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            line, cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT
        )
    signal.signal(signal.SIGINT, before)
    return process, folder / "log.txt"


def wait_for(path, process, log):
    deadline = time.monotonic() + 600
    while not path.is_file():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = small_config(folder, write_text(folder), max_steps=STEPS, val_check_interval=4)
    assert (
        run_here("fit", "--config", config, *MORE, "--last_checkpoint.every_n_train_steps", 1) == 0
    )
    return torch.load(folder / "runs" / "small" / "version_0" / "last.ckpt", weights_only=True)


def test_killed_and_resumed_is_uninterrupted(tmp_path, uninterrupted):
    config = small_config(tmp_path, write_text(tmp_path), max_steps=STEPS, val_check_interval=4)
    # The learning rate falls with max_steps, so a long run cannot stand for a killed short one:
    # training is slowed down, and killed as soon as there is a checkpoint.
    process, log = start(tmp_path, config, "--trainer.callbacks", "tests.callbacks.Slow")
    last = tmp_path / "runs" / "small" / "version_0" / "last.ckpt"
    wait_for(last, process, log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(last, weights_only=True)["global_step"] == 5
    assert not [name for name in everything_in(tmp_path) if name.endswith("small-1.json")]

    more = ("--last_checkpoint.every_n_train_steps", 1)
    assert run_here("fit", "--config", config, *MORE, *more, "--ckpt_path", last) == 0
    resumed = torch.load(last, weights_only=True)
    assert resumed["global_step"] == uninterrupted["global_step"] == STEPS
    assert torch.equal(resumed["training"]["train_bpc"], uninterrupted["training"]["train_bpc"])
    for name, weight in uninterrupted["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight), name


def test_a_finished_run_that_is_resumed_is_judged_again(tmp_path):
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config) == 0
    run = tmp_path / "runs" / "small" / "version_0"
    before = read_record(run / "small-1.json").metrics
    assert run_here("fit", "--config", config, "--ckpt_path", run / "last.ckpt") == 0
    after = read_record(run / "small-1.json").metrics
    for name in ("valid_bpc", "test_bpc", "characters", "steps"):
        assert after[name] == before[name], name


def test_the_clock_of_a_resumed_run_goes_on(tmp_path):
    config = small_config(tmp_path, write_text(tmp_path))
    run = tmp_path / "runs" / "small" / "version_0"
    more = ()
    before = 0.0
    for steps in (6, 9):
        assert run_here("fit", "--config", config, "--trainer.max_steps", steps, *more) == 0
        metrics = read_record(run / "small-1.json").metrics
        assert metrics["steps"] == steps
        read = metrics["characters_per_second"] * metrics["train_seconds"]
        assert read == pytest.approx(steps * 8 * 16)
        assert metrics["train_seconds"] > before
        before, more = metrics["train_seconds"], ("--ckpt_path", run / "last.ckpt")


@pytest.mark.parametrize("given", ["folder", "copy"])
def test_a_run_goes_on_from_its_folder_or_from_a_checkpoint_taken_out_of_it(tmp_path, given):
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config) == 0
    run = tmp_path / "runs" / "small" / "version_0"
    copy = tmp_path / "last.ckpt"
    copy.write_bytes((run / "last.ckpt").read_bytes())
    # In the folder of a run the last checkpoint is what goes on, not the best.
    (run / "best.ckpt").write_bytes(b"none")
    more = ("--ckpt_path", run if given == "folder" else copy, "--trainer.max_steps", 9)
    assert run_here("fit", "--config", config, *more) == 0
    written = run if given == "folder" else run.with_name("version_1")
    assert read_record(written / "small-1.json").metrics["steps"] == 9
    assert {path.name for path in run.parent.iterdir()} == {"version_0", written.name}


def scores(folder):
    """The best so far of a run, and its path, as its last checkpoint tells."""
    content = torch.load(folder / "last.ckpt", weights_only=True)
    (state,) = (state for key, state in content["callbacks"].items() if "Best" in key)
    return float(state["best_model_score"]), state["best_model_path"]


@pytest.mark.parametrize("kind", ["moved", "copied", "another logger"])
def test_the_best_checkpoint_of_a_run_is_kept(tmp_path, kind, monkeypatch):
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config) == 0
    run = tmp_path / "runs" / "small" / "version_0"
    score, _ = scores(run)
    best = (run / "best.ckpt").read_bytes()
    folder, more = run, ()
    if kind != "another logger":
        folder = tmp_path / "elsewhere" / "small" / "version_0"
        shutil.copytree(run, folder)
        if kind == "moved":
            shutil.rmtree(run)
    else:
        monkeypatch.chdir(tmp_path)
        more = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", tmp_path / "logs")
    # Every weight is thrown far away: nothing that comes is better.
    more += ("--model.optimization.learning_rate", 10, "--model.optimization.schedule", "constant")
    more += ("--ckpt_path", folder / "last.ckpt", "--trainer.max_steps", 9)
    assert run_here("fit", "--config", config, *more) == 0
    written = tmp_path / "logs/small/version_0" if kind == "another logger" else folder
    assert scores(written) == (score, str(written / "best.ckpt"))
    assert (written / "best.ckpt").read_bytes() == best
    metrics = read_record(written / "small-1.json").metrics
    assert metrics["valid_bpc"] == pytest.approx(score, rel=1e-6)
    if kind == "copied":
        assert (run / "best.ckpt").read_bytes() == best


def test_changed_settings_of_the_optimizer_are_applied_and_recorded(tmp_path):
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config) == 0
    run = tmp_path / "runs" / "small" / "version_0"
    more = ("--model.optimization.learning_rate", 0.5, "--model.optimization.weight_decay", 0.25)
    more += ("--ckpt_path", run, "--trainer.max_steps", 9)
    assert run_here("fit", "--config", config, *more) == 0
    (optimizer,) = torch.load(run / "last.ckpt", weights_only=True)["optimizer_states"]
    assert {group["initial_lr"] for group in optimizer["param_groups"]} == {0.5}
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.0, 0.25}
    recorded = read_record(run / "small-1.json").config["model"]["init_args"]["optimization"]
    assert (recorded["learning_rate"], recorded["weight_decay"]) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seed_everything", 2), "seed_everything is 2, and the run that goes on from"),
        (
            ("--model.flow.backbone.width", 12),
            "do not fit the model: size mismatch for flow.transforms.0",
        ),
        (("--model.flow.share_backbone", "true"), "are one parameter of the model, and two in"),
        (("--data.vocabulary", "bytes"), "another vocabulary (23 symbols, here 256)"),
    ],
)
def test_another_model_does_not_go_on(tmp_path, capfd, more, message):
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config, "--trainer.limit_test_batches", 0) == 0
    last = tmp_path / "runs" / "small" / "version_0" / "last.ckpt"
    before = everything_in(tmp_path)
    capfd.readouterr()
    more = (*more, "--ckpt_path", last, "--trainer.max_steps", 9)
    assert run_here("fit", "--config", config, *more) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert len(line) < 500
    assert everything_in(tmp_path) == before


def test_a_finished_run_without_its_best_checkpoint_is_refused(tmp_path, capsys):
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config) == 0
    run = tmp_path / "runs" / "small" / "version_0"
    (run / "best.ckpt").unlink()
    capsys.readouterr()
    assert run_here("fit", "--config", config, "--ckpt_path", run / "last.ckpt") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: the best checkpoint of the run, {run / 'best.ckpt'}, is gone")


LANGUAGE_MODEL = {
    "class_path": "lightning_modules.LanguageModel",
    "init_args": {
        "flow": {
            "class_path": "dflows.flows.language_model",
            "init_args": {
                "backbone": {"class_path": "dflows.backbones.LSTM", "init_args": {"width": 8}}
            },
        },
        "stateful": True,
    },
}
KILLED = {
    "in memory": {},
    "streamed": {"data": {"streaming": True, "num_workers": 1}},
    "n-grams": {"flow": {"ngram_order": 3}},
    "stateful": {"data": {"stateful": True}, "model": LANGUAGE_MODEL},
}
KILLS, LONG = 5, 60
HOOKS = {
    "on_train_batch_start": 1,
    "on_after_backward": 1,
    "on_train_batch_end": 1,
    "on_validation_batch_start": 6,
    "on_save_checkpoint": 4,
}
"""Where runs are killed, and after how many steps they come by there."""


def config_of(folder, changes):
    """Writes the configuration of a run that is to be killed, and returns its arguments."""
    path = small_config(folder, write_text(folder), max_steps=LONG, val_check_interval=6)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["model"] = changes.get("model", config["model"])
    config["model"]["init_args"]["flow"]["init_args"] |= changes.get("flow", {})
    config["data"]["init_args"] |= changes.get("data", {})
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    more = () if "model" in changes else MORE[:-2]
    return ("fit", "--config", path, *more, "--last_checkpoint.every_n_train_steps", 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLED)
def test_a_run_that_is_killed_again_and_again_is_the_uninterrupted_one(tmp_path, kind):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    assert run_here(*config_of(folders[0], KILLED[kind])) == 0
    arguments = config_of(folders[1], KILLED[kind])
    whole, run = (folder / "runs" / "small" / "version_0" for folder in folders)
    draw, step = random.Random(kind), 0
    for _ in range(KILLS):
        hook = draw.choice(list(HOOKS))
        step += draw.randint(1, 6)
        step += -step % HOOKS[hook]
        resume = ("--ckpt_path", run) if (run / "last.ckpt").is_file() else ()
        kill = ("--trainer.callbacks", "tests.callbacks.Send")
        for key, value in {"number": int(signal.SIGKILL), "step": step, "hook": hook}.items():
            kill += (f"--trainer.callbacks.{key}", value)
        version = ("--trainer.logger.version", 0)
        process = FORK.Process(target=run_here, args=(*arguments, *kill, *version, *resume))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert run_here(*arguments, "--trainer.logger.version", 0, "--ckpt_path", run) == 0
    for name in ("last.ckpt", "best.ckpt"):
        found, expected = (torch.load(one / name, weights_only=True) for one in (run, whole))
        assert found["global_step"] == expected["global_step"]
        for key, weight in expected["state_dict"].items():
            assert torch.equal(found["state_dict"][key], weight), (name, key)
    found, expected = (read_record(one / "small-1.json").metrics for one in (run, whole))
    for name in ("valid_bpc", "test_bpc", "steps", "characters"):
        assert found[name] == expected[name], name
