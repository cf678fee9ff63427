"""Keeps off the terminal what tells users nothing."""

import logging
import os
import threading
import warnings

__all__ = ["quiet"]

_WARNINGS = (
    # What is counted has no optimizer, and no parameters.
    ".*`LightningModule.configure_optimizers` returned `None`.*",
    ".*`parameters` is an empty generator.*",
    # Windows come from memory: workers would only slow them down.
    ".*does not have many workers.*",
    # A process that had no batch computes metrics together with those that had.
    ".*was called before the ``update`` method.*",
    # An LSTM whose weights are dropped at every call packs them at every call.
    ".*RNN module weights are not part of single contiguous chunk.*",
    # Lightning's use of torch is Lightning's to change.
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    # A learning rate that is tried and too large ends the search.
    ".*`training_step` returned `None`.*",
    # One checkpoint, of the same name, is all that a run keeps.
    ".*Checkpoint directory .* exists and is not empty.*",
    # Workers of a loader compute nothing that other threads could hold.
    ".*multi-threaded, use of fork.*",
)

_ADVICE = (
    *("💡", "TPU available", "HPU available", "GPU available", "Seed set to"),
    # dflows.cli.logs tells it on one line.
    *("Initializing distributed: ", "distributed_backend="),
)

_TALKATIVE = (
    "pytorch_lightning.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
    "lightning_fabric.utilities.distributed",
    "lightning_fabric.utilities.seed",
)


class _Advice(logging.Filter):
    """Creates a filter of Lightning's tips and of what it says of accelerators and processes."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(advice in message for advice in _ADVICE)


_raised = threading.excepthook


def _raise_later(failure: threading.ExceptHookArgs) -> None:
    """Says nothing of a log that cannot be written: what writes to it next raises the error."""
    writes = type(failure.thread).__name__ == "_AsyncWriterThread"
    if not (writes and issubclass(failure.exc_type, OSError)):
        _raised(failure)


def quiet() -> None:
    """Silences known warnings and tips of the libraries; what is unknown is shown."""
    # What is deprecated there is LightningCLI's to change.
    threading.excepthook = _raise_later
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # What is worked out once of an ordering is not compiled, and need not be.
    logging.getLogger("torch._dynamo.variables.tensor").setLevel(logging.ERROR)
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_Advice())
