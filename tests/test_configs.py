"""Every configuration that is shipped fits the signatures that it names, and runs where it can."""

import numpy as np
import pytest
import yaml

from dflows.cli.configs import FlowCLI, shipped_configs
from dflows.cli.noise import quiet
from tests.commands import ROOT, run_here, write_text

CONFIGS = ROOT / "configs"
ALL = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
# Laid over a configuration, and none by themselves.
OVERLAYS = [name for name in ALL if name.startswith("data/") or name == "smoke/ddp.yaml"]
EXPERIMENTS = [name for name in ALL if name not in OVERLAYS]
# Of rows of integers; all others are of text.
ARRAYS = ["array.yaml"]


def small_data(name, folder):
    """Arguments that put few data in the place of any others, and all files in one folder."""
    runs = ("--trainer.logger.save_dir", folder / "runs")
    if name in ARRAYS:
        np.save(folder / "rows.npy", np.arange(600).reshape(100, 6) % 5)
        return ("--data.path", folder / "rows.npy", *runs)
    text = write_text(folder, size=5000)
    return (
        *("--data.source", "datamodules.LocalText"),
        *("--data.source.init_args.path", text),
        *("--data.vocabulary", "corpus", "--data.max_eval_characters", 300),
        *runs,
    )


@pytest.fixture
def small(tmp_path):
    """Arguments that put a small text in the place of any other."""
    return small_data("quickstart.yaml", tmp_path)


def build(*arguments):
    quiet()
    return FlowCLI([str(argument) for argument in arguments])


def keys(value, prefix=""):
    """Every key that has a plain value, as it is written."""
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            yield from keys(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_all_of_them_are_shipped():
    assert {"quickstart.yaml", "paper.yaml", "autoregressive.yaml", "smoke/strided.yaml"} <= set(
        ALL
    )
    folders = {name.partition("/")[0] for name in ALL if "/" in name}
    assert folders >= {"data", "smoke", "text"}
    assert shipped_configs().joinpath("quickstart.yaml").is_file()


def shallow(value, key=""):
    """A configuration with networks of two layers at the most."""
    if isinstance(value, dict):
        return {name: shallow(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [shallow(entry) for entry in value]
    return min(value, 2) if key == "layers" else value


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_fits_the_signatures(name, tmp_path):
    # What is made for a GPU takes a step here with few layers on short windows, in no more passes.
    path, short = CONFIGS / name, ()
    if "/gpu/" in name:
        config = shallow(yaml.safe_load(path.read_text(encoding="utf-8")))
        path, short = tmp_path / "shallow.yaml", ("--data.length", 32)
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
    if name == "text/gpu/lanes-transformer.yaml":
        short = (*short, "--model.objective.init_args.passes", "[8, 32]")
    cli = build("--config", path, *small_data(name, tmp_path), *short)
    flow = cli.model.flow
    assert (flow.num_classes, flow.length) == (cli.datamodule.num_classes, cli.datamodule.length)
    assert cli.trainer.max_steps > 0 or cli.config.trainer.max_time is not None
    cli.datamodule.setup("fit")
    batch = next(iter(cli.datamodule.train_dataloader()))
    loss = -cli.model.evaluate_objective(batch[:2]).mean()
    cli.model.backward(loss)  # of a model that is counted there is none
    assert loss.isfinite()


def test_the_systems_of_the_comparison_are_of_equal_size(small):
    """All but the chain of n-grams, which has no network."""
    sizes = {}
    for name in EXPERIMENTS:
        if name.startswith("text/") and "/gpu/" not in name and name != "text/ngram.yaml":
            model = build("--config", CONFIGS / name, *small).model
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    of = sizes["text/transformer.yaml"]
    assert len(sizes) >= 13
    assert {name for name, size in sizes.items() if not 0.9 * of < size < 1.1 * of} == set()


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_fits_an_experiment(name, capsys):
    experiment = CONFIGS / "quickstart.yaml"
    before = ("--config", experiment, "--print_config")
    assert run_here("fit", *before) == 0
    plain = yaml.safe_load(capsys.readouterr().out)
    assert (
        run_here("fit", "--config", experiment, "--config", CONFIGS / name, "--print_config") == 0
    )
    merged = yaml.safe_load(capsys.readouterr().out)
    assert merged != plain
    assert merged["model"] == plain["model"]
    given = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    for key in keys(given):
        value, expected = merged, given
        for part in key.split("."):
            value, expected = value[part], expected[part]
        assert value == expected, key
    assert merged["data"]["init_args"]["length"] == plain["data"]["init_args"]["length"]


@pytest.mark.parametrize(
    "file",
    sorted(
        file for folder in ("configs", "experiments") for file in (ROOT / folder).rglob("*.yaml")
    ),
    ids=lambda file: file.relative_to(ROOT).as_posix(),
)
def test_a_configuration_says_what_it_is(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("smoke/")])
def test_a_smoke_experiment_runs(name, small, capsys):
    short = ("--trainer.max_steps", 4, "--trainer.val_check_interval", 2)
    bar = ("--progress_bar.refresh_rate", 0)
    assert run_here("fit", "--config", CONFIGS / name, *small, *short, *bar) == 0
    printed = capsys.readouterr().out
    assert "test, bits per character" in printed
    assert "250 characters, exact" in printed
