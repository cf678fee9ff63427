"""Running dflows' commands in tests, in this process or in one of their own."""

import os
import sys
import tempfile
from pathlib import Path

import yaml

from dflows import compress, decompress, evaluate, fit, generate, score
from tests.processes import as_torchrun, run_module

ROOT = Path(__file__).parents[1]
MAINS = {
    command.__name__.removeprefix("dflows."): command.main
    for command in (compress, decompress, evaluate, fit, generate, score)
}

# Combining accents, all kinds of line ends, a character beyond the first plane, a null.
ODD = "Ça va?\r\nCa\u0327 va!\u2028ß\t𝒳\0 naïve “oui”\r"


def write_text(folder, size=3000):
    """Writes a text of odd characters, and returns its path."""
    path = folder / "odd.txt"
    text = "".join(ODD[: 1 + (7 * n) % len(ODD)] for n in range(size))[:size]
    path.write_bytes(text.encode("utf-8"))
    return path


def small_config(folder, text, **trainer):
    """Writes the configuration of a run of seconds, and returns its path."""
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": "lightning_modules.FlowModule",
            "init_args": {
                "flow": {
                    "class_path": "dflows.flows.stack",
                    "init_args": {
                        "orderings": [
                            {"class_path": "dflows.orderings.Strided", "init_args": {"columns": 3}},
                            {"class_path": "dflows.orderings.Parity", "init_args": {"first": 1}},
                        ],
                        "backbone": {
                            "class_path": "dflows.backbones.DilatedConvolution",
                            "init_args": {"width": 8, "layers": 1},
                        },
                    },
                },
                "optimization": {"learning_rate": 0.01, "schedule": "linear"},
            },
        },
        "data": {
            "class_path": "datamodules.TextDataModule",
            "init_args": {
                "source": {
                    "class_path": "datamodules.LocalText",
                    "init_args": {"path": str(text), "fractions": [0.8, 0.1, 0.1]},
                },
                "length": 16,
                "batch_size": 8,
                "eval_batch_size": 4,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 6,
            "val_check_interval": 3,
            "logger": {
                "class_path": "TensorBoardLogger",
                "init_args": {"save_dir": str(folder / "runs")},
            },
            **trainer,
        },
        "progress_bar": {"refresh_rate": 0},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return path


def finished_run(folder, **trainer):
    """Trains a small run on odd text, and returns its folder."""
    config = small_config(folder, write_text(folder), **trainer)
    assert run_here("fit", "--config", config) == 0
    return folder / "runs" / "small" / "version_0"


def run_here(command, *arguments):
    """Runs a command in this process, and returns its exit code."""
    return MAINS[command](list(map(str, arguments)))


def command_line(command, *arguments):
    return [sys.executable, "-m", f"dflows.{command}", *map(str, arguments)]


def environment(**more):
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run_apart(command, *arguments, cwd, **more):
    """Runs a command in a process of its own, in another folder; in all that it has devices for.

    Of several, each is started as torchrun does.
    """
    line = list(map(str, arguments))
    devices = int(line[line.index("--trainer.devices") + 1]) if "--trainer.devices" in line else 1
    several = as_torchrun(devices) if devices > 1 else [{}]
    environments = [environment(**more, **variables) for variables in several]
    with tempfile.TemporaryDirectory() as folder:
        return run_module(f"dflows.{command}", line, str(cwd), environments, Path(folder))


def everything_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))
