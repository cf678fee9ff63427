"""The record of a finished run: one JSON file that tables, figures and the README are made from.

A record is complete or absent: it is written to a temporary file and moved into place. Metric names
are fixed (:data:`METRICS`), so that a table never misses a column over a spelling. Nothing in a
record names the machine it was made on, except for its processor.
"""

import json
import math
import numbers
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dflows.errors import UserError
from dflows.files import make_folder, write_text
from dflows.provenance import revision, versions

__all__ = [
    "METRICS",
    "Record",
    "check_folder",
    "check_name",
    "read_record",
    "read_records",
    "write_record",
]

METRICS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        # Likelihoods; the record says whether they are exact or bounds.
        "test_bpc": ("number", "bits per character of the test split"),
        "valid_bpc": ("number", "bits per character of the validation split"),
        "test_bpc_stateful": ("number", "test_bpc given what comes before each window"),
        "test_bpc_importance": ("number", "importance-weighted bound, where test_bpc is a bound"),
        "importance_samples": ("count", "samples of the importance-weighted bound"),
        "test_nats": ("number", "nats per example of the test split"),
        "valid_nats": ("number", "nats per example of the validation split"),
        "standard_error_nats": ("number", "standard error of test_nats, where examples are draws"),
        "characters": ("counts", "characters scored, by split"),
        "examples": ("counts", "examples scored, by split"),
        "archive_bpc": ("number", "bits per character of the split's archive, which decodes"),
        "archive_bytes": ("count", "bytes of that archive"),
        "compressed_bytes": ("counts", "bytes of the same text, by compressor"),
        "primed_bytes": ("counts", "bytes that it adds behind the training split, likewise"),
        "weights_bytes": ("count", "bytes of the model's parameters and buffers"),
        # What they are compared with.
        "unigram_bpc": ("number", "unigram entropy of the test split"),
        "valid_unigram_bpc": ("number", "unigram entropy of the validation split"),
        "bigram_bpc": ("number", "bigram entropy of the test split"),
        "exact_nats": ("number", "exact expected nats per example under the true distribution"),
        "entropy": ("number", "exact entropy of the distribution, nats"),
        "factorized_entropy": ("number", "sum of the exact marginal entropies, nats"),
        "reference_nats": ("number", "nats per example of the best tabular flow found"),
        "layerwise_nats": ("number", "nats per example of tables that are fitted layerwise"),
        "exhaustive_nats": ("number", "nats of the best of all bijections of the states"),
        "kl": ("number", "exact divergence of the model from the distribution, nats"),
        "factorized_kl": ("number", "kl of the best factorized base, nats"),
        "reference_kl": ("number", "kl of the best tabular flow found, nats"),
        "probabilities": ("numbers", "the model's of every state, the last dimension first"),
        "accuracy": ("number", "share of test examples predicted exactly by greedy decoding"),
        # The transforms.
        "residual_bpc": ("numbers", "bits per dimension after each transform was undone, on test"),
        "level_bpc": ("numbers", "bits per dimension of each level of the one ordering, on test"),
        "untransformed": ("count", "dimensions that no transform changes"),
        "passes": ("count", "sequential network evaluations of one batch of samples"),
        "passes_bpc": ("mapping", "test_bpc of the same network, by number of passes"),
        "samples": ("texts", "generated windows, drawn with the seed of the run"),
        "fixed_point_iterations": (
            "number",
            "mean iterations of fixed-point generation of 1 sequence",
        ),
        # Gradients of objectives and rules against the exact one.
        "gradient_cosine": ("number", "cosine of the mean gradient with the exact one"),
        "gradient_norm_ratio": ("number", "norm of the mean gradient over the exact one's"),
        "gradient_mixture_cosine": ("number", "cosine with the gradient of the mixture"),
        "gradient_mixture_norm_ratio": ("number", "norm over that of the mixture's gradient"),
        "gradient_variance": ("number", "variance of the gradient over the exact squared norm"),
        "gradient_standard_error": ("number", "of the mean gradient, over the exact norm"),
        # Speed.
        "steps": ("count", "optimizer steps"),
        "train_seconds": ("number", "seconds of training, without evaluation"),
        "characters_per_second": ("number", "characters trained on in a second"),
        "examples_per_second": ("number", "examples trained on in a second"),
        "generation_length": ("count", "characters of a sequence that is timed"),
        "generation_seconds_1": ("number", "median seconds to generate 1 sequence"),
        "generation_seconds_1_p95": ("number", "95th percentile of the same"),
        "generation_seconds_32": ("number", "median seconds to generate 32 sequences at once"),
        "generation_seconds_32_p95": ("number", "95th percentile of the same"),
        "passes_seconds_1": ("mapping", "generation_seconds_1 by number of passes"),
        "archive_seconds": ("number", "seconds to encode the archive"),
        "archive_seconds_back": ("number", "seconds to decode it"),
        "generation_bytes_1": ("count", "peak device memory generating 1 sequence, bytes"),
        "generation_bytes_32": ("count", "peak device memory generating 32 sequences, bytes"),
        # Speed in benchmarks, of an opponent too, and what the device can do.
        "generation_ratio_1": ("number", "the opponent's seconds for 1 sequence over these"),
        "generation_ratio_32": ("number", "the opponent's seconds for 32 sequences over these"),
        "naive_ratio_1": ("number", "the naive opponent's seconds for 1 sequence over these"),
        "naive_ratio_32": ("number", "the naive opponent's seconds for 32 sequences over these"),
        "decode_seconds_1": ("number", "median seconds to decode an archive of 1 sequence"),
        "decode_seconds_32": ("number", "the same for 32 sequences"),
        "decode_ratio_1": ("number", "the opponent's seconds to decode 1 sequence over these"),
        "decode_ratio_32": ("number", "the opponent's seconds to decode 32 over these"),
        "roofline_seconds_1": ("number", "least seconds for 1 sequence that the device allows"),
        "roofline_seconds_32": ("number", "the same for 32 sequences"),
        "memory_bandwidth": ("number", "measured bytes a second"),
        "matrix_rate": ("number", "measured floating-point operations a second"),
        "call_seconds": ("number", "median seconds of one call"),
        "call_seconds_p95": ("number", "95th percentile of the same"),
        "call_bytes": ("count", "peak memory of tensors that one call takes, bytes"),
        "seconds_ratio": ("number", "the opponent's seconds of one call over these"),
        "bytes_ratio": ("number", "the opponent's bytes of one call over these"),
        # Training on several devices, and what a step asks of one.
        "step_seconds": ("number", "mean seconds of an optimizer step"),
        "process_bytes": ("count", "peak memory of tensors that a process trains with, bytes"),
        "link_bandwidth": ("number", "measured bytes a second from a process to another"),
        "batch_characters": ("count", "characters of a device's batch"),
        "batch_bytes": ("count", "bytes that its backward pass needs"),
        "batch_operations": ("count", "its floating-point operations, forward and backward"),
        # Drills.
        "exit_codes": ("numbers", "of the processes that were started"),
        "seconds_to_end": ("number", "seconds from a fault to the end of all processes"),
    }
)
"""The metrics that a record may hold: the kind of each value, and what it means.

A number is finite; a count a whole number of at least 0; numbers are a list, one an entry of the
model; counts are a mapping of names to counts, and a mapping is one of whole numbers, as text, to
numbers; texts are a list of text.
"""

_KINDS = {
    "number": "a finite number",
    "numbers": "a list of finite numbers",
    "count": "a whole number of at least 0",
    "texts": "a list of text",
    "counts": "a mapping of names to whole numbers of at least 0",
    "mapping": "a mapping of whole numbers to finite numbers",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LIKELIHOODS = ("exact", "bound")


def check_name(key: str, name: str) -> None:
    """Refuses what cannot be the name of a record.

    Args:
        key: What the name is called.
        name: The name.

    Raises:
        UserError: If it has other than letters, digits, dots, dashes and underscores, does not
            begin with a letter or digit, or is too long.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{key} is {name!r}: expected at most 100 letters, digits, dots, dashes and "
            "underscores, the first a letter or digit"
        )


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder that records cannot be written into, and makes nothing.

    Args:
        folder: A folder, which need not be there.

    Raises:
        UserError: If it, or the first part of its path that is there, is no folder to write in.
    """
    folder = Path(folder)
    try:
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        reason = None if place.is_dir() else f"{place} is a file"
        if reason is None and not os.access(place, os.W_OK | os.X_OK):
            reason = f"{place} cannot be written in"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise UserError(f"no record can be written into {folder}: {reason}; give another folder")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def _of_kind(value: object, kind: str) -> bool:
    match kind:
        case "number":
            return _is_number(value)
        case "count":
            return _is_count(value)
        case "numbers":
            return isinstance(value, list) and all(map(_is_number, value))
        case "texts":
            return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        case "mapping":
            numbered = isinstance(value, dict) and all(map(str.isdecimal, value))
            return numbered and all(map(_is_number, value.values()))  # type: ignore[attr-defined]
        case _:
            return isinstance(value, dict) and all(map(_is_count, value.values()))


def _plain(value: Any, key: str) -> Any:
    """Returns a value in the types that JSON has."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise UserError(f"{key} has the key {name!r}: expected text")
        return {name: _plain(entry, f"{key}.{name}") for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, f"{key}.{index}") for index, entry in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise UserError(
        f"{key} is a {type(value).__name__}, which JSON cannot hold: "
        "expected text, numbers, booleans, null, lists and mappings of them"
    )


def _worded(value: Any) -> Any:
    """Replaces the floats of a configuration that JSON has no name for by words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _worded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_worded(entry) for entry in value]
    return value


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    for name, value in metrics.items():
        if name not in METRICS:
            raise UserError(
                f"metrics.{name} is unknown: expected one of {', '.join(sorted(METRICS))} "
                "(a new one is added to METRICS in dflows/records.py)"
            )
        kind, meaning = METRICS[name]
        if not _of_kind(value, kind):
            raise UserError(f"metrics.{name} is {value!r}: expected {_KINDS[kind]} ({meaning})")


@dataclass(frozen=True, kw_only=True)
class Record:
    """Creates the record of a finished run, and checks it.

    Tensors, NumPy scalars, tuples and paths become what JSON has for them; infinities of the
    configuration become words.

    Args:
        name: What was run, in letters, digits, dots, dashes and underscores. Name and seed make the
            name of the file: the same run, repeated, replaces its record.
        kind: The command that ran, for example ``fit``.
        config: The resolved configuration.
        seed: The seed.
        device: The processor or GPU (:func:`dflows.provenance.describe_device`).
        precision: The precision of the trainer, for example ``bf16-mixed``.
        seconds: Seconds that the run took.
        parameters: Trained numbers of the model.
        metrics: Values by name; the names are those of :data:`METRICS`.
        likelihood: ``exact``, or ``bound`` where the likelihoods are bounds.
        budget: What the run was allowed, for example ``CPU, 20 minutes``; empty where nothing was
            said.
        revision: The revision of the code (:func:`dflows.provenance.revision`).
        date: When the run ended, ISO 8601, UTC.
        versions: Versions of the libraries, by name (:func:`dflows.provenance.versions`).

    Raises:
        UserError: If an entry is not what is described here, a metric is unknown, or one is not
            finite.

    Example:
        >>> record = Record(
        ...     name="quickstart",
        ...     kind="fit",
        ...     config={"seed_everything": 0},
        ...     seed=0,
        ...     device="CPU",
        ...     precision="32-true",
        ...     seconds=240.5,
        ...     parameters=1_000,
        ...     metrics={"test_bpc": 2.4, "characters": {"test": 215_000}},
        ... )
        >>> record.file_name
        'quickstart-0.json'
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    seed: int
    device: str
    precision: str
    seconds: float
    parameters: int
    metrics: Mapping[str, Any]
    likelihood: str = "exact"
    budget: str = ""
    revision: str = field(default_factory=revision)
    date: str = field(default_factory=_now)
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = _plain(getattr(self, entry.name), entry.name)
            object.__setattr__(self, entry.name, value)
        object.__setattr__(self, "config", _worded(self.config))
        self._check_texts()
        self._check_values()

    def _check_texts(self) -> None:
        texts = ("name", "kind", "device", "precision", "likelihood", "budget", "revision", "date")
        for key in texts:
            value = getattr(self, key)
            if not isinstance(value, str) or not (value or key == "budget"):
                raise UserError(f"{key} is {value!r}: expected text")
        for key in ("name", "kind"):
            check_name(key, getattr(self, key))
        if self.likelihood not in _LIKELIHOODS:
            raise UserError(
                f"likelihood is {self.likelihood!r}: expected {' or '.join(_LIKELIHOODS)}"
            )
        try:
            offset = datetime.fromisoformat(self.date).utcoffset()
        except ValueError:
            offset = None
        if offset != timedelta(0):
            raise UserError(
                f"date is {self.date!r}: expected ISO 8601 in UTC, like 2026-01-31T12:00:00+00:00"
            )

    def _check_values(self) -> None:
        for key in ("seed", "parameters"):
            if not _is_count(getattr(self, key)):
                raise UserError(f"{key} is {getattr(self, key)!r}: expected {_KINDS['count']}")
        if not _is_number(self.seconds) or self.seconds < 0:
            raise UserError(f"seconds is {self.seconds!r}: expected a number of at least 0")
        for key in ("config", "metrics", "versions"):
            if not isinstance(getattr(self, key), dict):
                raise UserError(f"{key} is {getattr(self, key)!r}: expected a mapping")
        for library, version in self.versions.items():
            if not isinstance(version, str):
                raise UserError(f"versions.{library} is {version!r}: expected text")
        _check_metrics(self.metrics)

    @property
    def file_name(self) -> str:
        """The name of the record's file."""
        return f"{self.name}-{self.seed}.json"


def write_record(folder: str | os.PathLike[str], record: Record) -> Path:
    """Writes a record into a folder, which is made where it is missing.

    The file appears whole or not at all, also when the process or the machine dies. Of several
    processes, only one should write.

    Args:
        folder: Where to, for example ``results``.
        record: What to write.

    Returns:
        The file.

    Raises:
        UserError: If it cannot be written.
    """
    folder = Path(folder)
    file = folder / record.file_name
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    make_folder(folder)
    write_text(file, text)
    return file


def read_record(file: str | os.PathLike[str]) -> Record:
    """Reads a record and checks it.

    Args:
        file: A file that :func:`write_record` has written.

    Returns:
        The record.

    Raises:
        UserError: If the file is missing or is no record; the message names the file and the key.
    """
    file = Path(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}: expected the keys of a record")
    known = [entry.name for entry in fields(Record)]
    if missing := [key for key in known if key not in content]:
        raise UserError(f"{file} lacks {', '.join(missing)}: every record has {', '.join(known)}")
    if unknown := sorted(set(content) - set(known)):
        raise UserError(
            f"{file} has the unknown key {', '.join(unknown)}: expected only {', '.join(known)}"
        )
    try:
        return Record(**content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def read_records(folder: str | os.PathLike[str]) -> list[Record]:
    """Reads all records of a folder, not of those inside it, ordered by the names of their files.

    Args:
        folder: A folder in which every ``*.json`` is a record.

    Returns:
        The records.

    Raises:
        UserError: If the folder is missing, or a file in it is no record.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected one that holds records")
    return [read_record(file) for file in sorted(folder.glob("*.json"))]
