"""The trainer of the tests of modules: on the CPU, silent, and without files."""

from typing import Any

import pytorch_lightning as pl

from dflows.cli.noise import quiet


def trainer(folder, steps=4, **options):
    """A trainer for so many steps, with keys of Lightning's own over the usual ones."""
    quiet()
    usual: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**usual | options)
