"""The data of a checkpoint, as it describes them."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from datamodules.module import StreamDataModule
from dflows.cli.checkpoints import Checkpoint
from dflows.cli.configs import Parser
from lightning_modules.descriptions import check_description

__all__ = ["config_of", "data_of"]


def config_of(checkpoint: Checkpoint, allowed: Sequence[str], folder: Path) -> dict[str, Any]:
    """Returns the configuration of a checkpoint's data, with the vocabulary of the checkpoint.

    It is a file of the folder, or the number of classes that was found in the data.

    Args:
        checkpoint: The checkpoint.
        allowed: Packages whose classes it may name.
        folder: A folder that lives as long as the configuration is used.

    Raises:
        UserError: If it names classes of other packages.
    """
    described: Any = checkpoint.config.get("data")
    check_description(StreamDataModule, described, allowed, checkpoint.path)
    data = dict(described)
    arguments = data["init_args"] = {**data.get("init_args", {})}
    if "vocabulary" in arguments:
        arguments["vocabulary"] = str(checkpoint.vocabulary.save(folder))
    if "num_classes" in arguments:
        arguments["num_classes"] = checkpoint.vocabulary.num_classes
    return data


def data_of(checkpoint: Checkpoint, allowed: Sequence[str] = ()) -> StreamDataModule:
    """Returns the data of a checkpoint, ready to be read.

    Raises:
        UserError: If they cannot be made, or are not on this machine.
    """
    parser = Parser()
    parser.add_lightning_class_args(StreamDataModule, "data", subclass_mode=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "data.yaml")
        data = config_of(checkpoint, allowed, Path(folder))
        file.write_text(yaml.safe_dump({"data": data}), encoding="utf-8")
        made: StreamDataModule = parser.instantiate_classes(parser.parse_path(str(file))).data
        made.prepare_data()
        made.setup("fit")
    return made
