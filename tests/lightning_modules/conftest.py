"""Data that the tests of several modules train on."""

import pytest

from datamodules import LocalText, TextDataModule
from tests.commands import write_text


@pytest.fixture
def text(tmp_path):
    """A small text, in windows of 16 characters."""
    source = LocalText(path=write_text(tmp_path).as_posix(), fractions=(0.8, 0.1, 0.1))
    return TextDataModule(source, length=16, batch_size=4, eval_batch_size=3)
