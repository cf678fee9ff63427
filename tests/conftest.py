"""What every test runs under: no network, no display, a fixed seed, one thread."""

import os
import signal
import sys
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
    yield
    try:
        import resource
    except ImportError:  # not a system that tells
        return
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < 2 * 1024**3


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
