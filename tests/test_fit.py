"""``python -m dflows.fit``: a run leaves what it promises, and the command line works."""

import json
import re
import tempfile
from dataclasses import asdict

import pytest
import torch
import yaml

from dflows.cli.checkpoints import read_checkpoint
from dflows.records import read_record
from tests.commands import ODD, ROOT, run_apart, run_here, small_config, write_text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in a process of its own, on odd text, from a folder that is not the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    config = small_config(folder, write_text(folder))
    done = run_apart("fit", "--config", config, "--record", "records", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_the_run_has_checkpoints_configuration_vocabulary_and_record(finished):
    folder, _ = finished
    run = folder / "runs" / "small" / "version_0"
    names = {path.name for path in run.iterdir()}
    assert {"best.ckpt", "last.ckpt", "config.yaml", "tokenizer.json", "small-1.json"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    assert (folder / "records" / "small-1.json").read_bytes() == (run / "small-1.json").read_bytes()
    resolved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert "FactorizedBase" in str(resolved["model"]["init_args"]["flow"]["init_args"]["base"])


def test_the_record_holds_the_figures_of_the_table(finished):
    folder, done = finished
    record = read_record(folder / "records" / "small-1.json")
    metrics = record.metrics
    assert metrics["characters"] == {"valid": 300, "test": 300}
    assert metrics["passes"] == 3
    # An iteration settles a level or more, and one a flow sees that all are settled.
    assert 2 <= metrics["fixed_point_iterations"] <= 3 + 2
    assert metrics["steps"] == 6
    assert len(metrics["residual_bpc"]) == 2
    assert record.likelihood == "exact"
    assert record.config["model"]["init_args"]["flow"]["init_args"]["length"] == 16
    for figure in (f"{metrics['test_bpc']:.4f}", f"{metrics['valid_bpc']:.4f}", "300 characters"):
        assert figure in done.stdout
    assert re.search(rf"test, unigram entropy *│ *{metrics['unigram_bpc']:.4f}", done.stdout)
    assert "generating 32 sequences" in done.stdout
    assert [len(sample) for sample in metrics["samples"]] == [16] * 4
    assert "sample" in done.stdout


def test_the_record_is_of_the_model_that_a_checkpoint_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path, write_text(tmp_path))
    dropout = ("--model.flow.backbone.dropout", "0.5")
    assert run_here("fit", "--config", config, *dropout, "--record", "records") == 0
    capsys.readouterr()
    checkpoint = tmp_path / "runs" / "small" / "version_0" / "best.ckpt"
    assert run_here("generate", "--checkpoint", checkpoint, "--seed", 1) == 0
    samples = read_record(tmp_path / "records" / "small-1.json").metrics["samples"]
    assert capsys.readouterr().out == "\n".join([*samples, ""])


def test_only_figures_are_printed_and_nothing_is_complained_of(finished):
    _, done = finished
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    # The model, where it runs, two validations, the end, and the scores of the best checkpoint.
    assert len(done.stderr.splitlines()) == 7
    assert done.stderr.count(" 32-true; python 3") == 1


@pytest.mark.parametrize("level", ["info", "warning"])
def test_the_log_level_is_that_of_a_command(finished, level, capfd):
    folder, _ = finished
    run = folder / "runs" / "small" / "version_0"
    assert run_here("evaluate", "--checkpoint", run, "--log_level", level) == 0
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == {"info": 2, "warning": 0}[level]


def test_the_checkpoint_is_read_without_running_code_and_holds_the_vocabulary(finished):
    folder, _ = finished
    run = folder / "runs" / "small" / "version_0"
    content = torch.load(run / "best.ckpt", weights_only=True)
    assert content["dflows"]["vocabulary"] == (run / "tokenizer.json").read_text(encoding="utf-8")
    assert set(json.loads(content["dflows"]["vocabulary"])["model"]["vocab"]) == set(ODD)


def test_a_run_starts_with_the_weights_of_another(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = finished[0] / "runs" / "small" / "version_0"
    config = small_config(tmp_path, write_text(tmp_path), max_steps=1)
    still = ("--model.init_args.optimization.learning_rate", 1e-12)
    assert run_here("fit", "--config", config, "--start", start, *still) == 0
    weights, before = (
        read_checkpoint(folder).weights
        for folder in (tmp_path / "runs" / "small" / "version_0", start)
    )
    for name, value in before.items():
        if name.startswith("flow.transforms"):
            assert torch.allclose(weights[name], value, atol=1e-6)
    other = tmp_path / "other.txt"
    other.write_text("other text " * 400, encoding="utf-8")
    changed = ("--data.init_args.source.init_args.path", other)
    assert run_here("fit", "--config", config, "--start", start, *changed) == 1
    assert "was trained with another vocabulary" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_goes_on_in_its_folder_until_the_new_end(finished):
    folder, _ = finished
    last = folder / "runs" / "small" / "version_0" / "last.ckpt"
    before = torch.load(last, weights_only=True)["global_step"]
    config = folder / "small.yaml"
    code = run_here("fit", "--config", config, "--ckpt_path", last, "--trainer.max_steps", 9)
    assert code == 0
    assert (before, torch.load(last, weights_only=True)["global_step"]) == (6, 9)
    assert [path.name for path in last.parents[1].iterdir()] == ["version_0"]


def test_configuration_printed_and_read_again_is_the_same(finished, tmp_path, capsys):
    folder, _ = finished
    path, printed = folder / "small.yaml", []
    for _ in range(3):
        assert run_here("fit", "--config", path, "--print_config") == 0
        printed.append(capsys.readouterr().out)
        path = tmp_path / "small.yaml"
        path.write_text(printed[-1], encoding="utf-8")
    first, second, third = printed
    assert second == third
    configs = [yaml.safe_load(text) for text in (first, second)]
    # The default base is printed by its name, and with its arguments when that is read.
    bases = [config["model"]["init_args"]["flow"]["init_args"].pop("base") for config in configs]
    assert bases[0] == bases[1]["class_path"] == "dflows.FactorizedBase"
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kept", ["record", "checkpoint", "folder"])
def test_configurations_that_a_run_keeps_are_run_again(finished, tmp_path, monkeypatch, kept):
    folder, _ = finished
    run = folder / "runs" / "small" / "version_0"
    if kept == "folder":
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    elif kept == "record":
        config = read_record(run / "small-1.json").config
    else:
        config = torch.load(run / "best.ckpt", weights_only=True)["dflows"]["config"]
    flow = config["model"]["init_args"]["flow"]["init_args"]
    assert (flow.get("length") == 16) == (kept != "folder")
    monkeypatch.chdir(folder)
    (tmp_path / "kept.yaml").write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    more = ("--record", tmp_path, "--name", "again", "--trainer.max_steps", 3)
    more += ("--ckpt_path", "null", "--data.source.init_args.path", "odd.txt")
    assert run_here("fit", "--config", tmp_path / "kept.yaml", *more) == 0
    assert read_record(tmp_path / "again-1.json").metrics["steps"] == 3


def test_help_lists_keys(capsys):
    assert run_here("fit", "--help") == 0
    printed = capsys.readouterr().out
    for key in ("--ckpt_path", "--trainer.max_steps", "--data", "--best_checkpoint.monitor"):
        assert key in printed


def test_settings_are_laid_over_each_other_and_by_dotted_arguments(finished, tmp_path, capsys):
    folder, _ = finished
    (tmp_path / "more.yaml").write_text("trainer: {max_steps: 11}\nname: other\n")
    arguments = ("--config", folder / "small.yaml", "--config", tmp_path / "more.yaml")
    more = ("--data.init_args.length", 24, "--model.flow.backbone.width", 12, "--print_config")
    assert run_here("fit", *arguments, *more) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["max_steps"] == 11
    assert config["name"] == "other"
    assert config["data"]["init_args"]["length"] == 24
    backbone = config["model"]["init_args"]["flow"]["init_args"]["backbone"]["init_args"]
    assert backbone == {
        **backbone,
        "width": 12,
        "layers": 1,
    }


def test_shipped_configuration_is_found_by_its_bare_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here("fit", "--config", "smoke/strided.yaml", "--print_config") == 0
    shipped = yaml.safe_load(capsys.readouterr().out)
    assert run_here("fit", "--config", ROOT / "configs/smoke/strided.yaml", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out) == shipped


def test_the_log_holds_the_course_of_the_bits(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = finished
    events = EventAccumulator(str(folder / "runs" / "small" / "version_0"))
    events.Reload()
    assert [point.step for point in events.Scalars("valid_bpc")][:2] == [2, 5]


def test_both_likelihoods_are_those_of_the_best_checkpoint(tmp_path, capsys):
    config = small_config(tmp_path, write_text(tmp_path), max_steps=9)
    # By this measure the first validation is the best, and not that of the smallest valid_bpc.
    more = ("--best_checkpoint.monitor", "valid_nats", "--best_checkpoint.mode", "max")
    assert run_here("fit", "--config", config, *more) == 0
    run = tmp_path / "runs" / "small" / "version_0"
    metrics = read_record(run / "small-1.json").metrics
    assert torch.load(run / "best.ckpt", weights_only=True)["global_step"] == 3
    assert run_here("evaluate", "--checkpoint", run / "best.ckpt", "--split", "valid") == 0
    assert f"{metrics['valid_bpc']:.4f}" in capsys.readouterr().out.split("best.ckpt")[-1]


def test_the_end_of_the_epochs_is_validated_and_kept(tmp_path):
    options = {"max_steps": -1, "limit_train_batches": 3, "log_every_n_steps": 1}
    config = small_config(tmp_path, write_text(tmp_path), val_check_interval=1000, **options)
    arguments = ("--config", config, "--trainer.max_epochs")
    run = tmp_path / "runs" / "small" / "version_0"
    for epochs, more in ((2, ()), (2, ("--ckpt_path", run)), (4, ("--ckpt_path", run))):
        assert run_here("fit", *arguments, epochs, *more) == 0
        for name in ("best.ckpt", "last.ckpt"):
            assert torch.load(run / name, weights_only=True)["global_step"] == 3 * epochs
        assert read_record(run / "small-1.json").metrics["steps"] == 3 * epochs


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_that_is_not_read_has_no_figures(split, tmp_path):
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config, f"--trainer.limit_{split}_batches", 0) == 0
    record = read_record(next(tmp_path.glob("runs/small/version_0/small-1.json")))
    assert list(record.metrics["characters"]) == [{"val": "test", "test": "valid"}[split]]


def names_the_machine(text, folder):
    return re.search(r'"(host|user)', text) or str(folder) in text or tempfile.gettempdir() in text


def test_nothing_names_the_machine(finished):
    folder, _ = finished
    record = read_record(folder / "records" / "small-1.json")
    assert not names_the_machine(json.dumps(asdict(record)), folder)
    assert record.config["data"]["init_args"]["source"]["init_args"]["path"] == "odd.txt"
    assert not {"record", "ckpt_path"} & set(record.config)


@pytest.mark.parametrize("command", ["fit", "evaluate"])
@pytest.mark.parametrize("inside", [True, False])
def test_nor_do_a_resumed_fit_and_an_evaluation(command, inside, tmp_path, monkeypatch):
    config = small_config(tmp_path, write_text(tmp_path))
    assert run_here("fit", "--config", config) == 0
    run = tmp_path / "runs" / "small" / "version_0"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path if inside else elsewhere)
    if command == "fit":
        more = ("--config", config, "--ckpt_path", run / "last.ckpt", "--trainer.max_steps", 9)
        name = "small-1.json"
    else:
        more = ("--checkpoint", run / "best.ckpt")
        name = "small-test-1.json"
    assert run_here(command, *more, "--record", tmp_path / "records") == 0
    record = read_record(tmp_path / "records" / name)
    assert not names_the_machine(json.dumps(asdict(record)), tmp_path)
    assert record.config["data"]["init_args"]["vocabulary"] == "train"
    saved = record.config["trainer"]["logger"]["init_args"]["save_dir"]
    assert saved == ("runs" if inside else ".../runs")
    if command == "fit":
        # The configuration beside the checkpoints has to work where the record's has to tell.
        kept = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        folder = kept["trainer"]["logger"]["init_args"]["save_dir"]
        assert folder == ("runs" if inside else str(tmp_path / "runs"))


def files_of_the_run(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith("events.out.")}


FILES = {"best.ckpt", "last.ckpt", "config.yaml", "tokenizer.json", "small-1.json"}


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (("--trainer.enable_progress_bar", "false"), "runs/small/version_0"),
        (
            ("--trainer.callbacks+=TQDMProgressBar", "--progress_bar.refresh_rate", 1),
            "runs/small/version_0",
        ),
        (("--trainer.logger", "false"), "runs/small/version_0"),
        (("--trainer.logger", "tests.callbacks.Folderless"), "runs/small/version_0"),
        (
            ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"),
            "logs/small/version_0",
        ),
    ],
)
def test_bars_and_loggers_of_all_kinds_work(tmp_path, monkeypatch, arguments, folder):
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path, write_text(tmp_path), max_steps=2, val_check_interval=2)
    assert run_here("fit", "--config", config, *arguments) == 0
    assert files_of_the_run(tmp_path / folder) >= FILES
    assert not list(tmp_path.glob("*.ckpt"))


def test_runs_without_a_logger_do_not_write_over_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path, write_text(tmp_path), max_steps=2, val_check_interval=2)
    for _ in range(2):
        assert run_here("fit", "--config", config, "--trainer.logger", "false") == 0
    runs = tmp_path / "runs" / "small"
    assert [files_of_the_run(runs / f"version_{n}") for n in (0, 1)] == [FILES, FILES]
    more = ("--trainer.logger", "false", "--trainer.max_steps", 4)
    assert run_here("fit", "--config", config, *more, "--ckpt_path", runs / "version_0") == 0
    assert sorted(path.name for path in runs.iterdir()) == ["version_0", "version_1"]


def test_what_finders_found_is_recorded_and_used(tmp_path):
    config = small_config(tmp_path, write_text(tmp_path), max_steps=3, val_check_interval=3)
    arguments = ("--trainer.callbacks+=LearningRateFinder",)
    arguments += ("--trainer.callbacks.num_training_steps", 20)
    arguments += ("--trainer.callbacks+=BatchSizeFinder", "--trainer.callbacks.max_trials", 3)
    arguments += ("--trainer.callbacks.steps_per_trial", 2)
    assert run_here("fit", "--config", config, *arguments) == 0
    run = tmp_path / "runs" / "small" / "version_0"
    record = read_record(run / "small-1.json")
    rate = record.config["model"]["init_args"]["optimization"]["learning_rate"]
    size = record.config["data"]["init_args"]["batch_size"]
    assert rate != 0.01
    assert size == 8
    content = torch.load(run / "last.ckpt", weights_only=True)
    (optimizer,) = content["optimizer_states"]
    assert {group["initial_lr"] for group in optimizer["param_groups"]} == {rate}
    kept = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert kept["model"]["init_args"]["optimization"]["learning_rate"] == rate
    assert kept["data"]["init_args"]["batch_size"] == size
    read = record.metrics["characters_per_second"] * record.metrics["train_seconds"]
    assert read == pytest.approx(3 * size * 16)
    assert record.metrics["steps"] == 3


def test_a_run_that_diverges_ends_in_one_line_and_is_not_recorded(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--config", "smoke/strided.yaml", "--model.optimization.learning_rate", 1e9)
    arguments += ("--trainer.max_steps", 60, "--trainer.val_check_interval", 20)
    assert run_here("fit", *arguments, "--record", "records") == 1
    error = capfd.readouterr().err.splitlines()
    assert [line for line in error if line.startswith("error: ")] == error[-1:]
    assert re.search(r"step \d+", error[-1])
    assert not list(tmp_path.rglob("*-[01].json"))
    for path in tmp_path.rglob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(torch.isfinite(weight).all() for weight in weights), path
