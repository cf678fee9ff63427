"""What every test runs under: no network, no display, a fixed seed, one thread."""

import gc
import os
import re
import signal
import tempfile

# Read by the libraries when they are imported, hence before any of them is.
_cache = tempfile.TemporaryDirectory(prefix="dflows-tests-", ignore_cleanup_errors=True)
# As the commands do: what is deprecated there is LightningCLI's to change.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
os.environ["HF_HOME"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# What runs tests in several processes sets 80, where tables break their lines.
os.environ["COLUMNS"] = "120"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In the background of a shell; tests, and the commands that they start, are interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "dflows",
    deadline=None,
    derandomize=True,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("dflows")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _moderate() -> Iterator[None]:
    """Machines that run tests are small: no process of the tests takes more than 2 GB."""
    gc.freeze()  # the tests themselves, which are many, are not looked through again
    yield
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:  # not a system that tells
        return
    # What `getrusage` tells begins with the peak of the process that started this one.
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) < 2 * 1024**2


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Iterator[None]:
    """Trainers and their modules hold each other in cycles, which are seldom looked for."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
