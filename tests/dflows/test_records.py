"""Records: whole or absent, checked when written and when read."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from dflows import records
from dflows.errors import UserError
from dflows.records import (
    METRICS,
    Record,
    read_record,
    read_records,
    write_record,
)

EXAMPLES = {
    "number": 1.5,
    "numbers": [1.5, 2, 0.0],
    "count": 3,
    "counts": {"test": 3, "valid": 0},
    "mapping": {"32": 1.75, "64": 1.5},
    "texts": ["to be\n", ""],
}


def record(**changes) -> Record:
    entries = {
        "name": "quickstart",
        "kind": "fit",
        "config": {
            "seed_everything": 3,
            "model": {"orderings": [{"class_path": "x.Y"}], "a": None},
        },
        "seed": 3,
        "device": "a processor",
        "precision": "32-true",
        "seconds": 12.5,
        "parameters": 1000,
        "metrics": {"test_bpc": 2.5, "characters": {"test": 10, "valid": 9}},
    }
    return Record(**{**entries, **changes})


def test_round_trip(tmp_path):
    written = record(metrics={name: EXAMPLES[kind] for name, (kind, _) in METRICS.items()})
    file = write_record(tmp_path / "new" / "folder", written)
    assert file == tmp_path / "new" / "folder" / "quickstart-3.json"
    assert read_record(file) == written
    assert read_records(file.parent) == [written]


def test_file_is_readable_json_in_the_order_of_the_fields(tmp_path):
    content = write_record(tmp_path, record(device="Ω ™")).read_text(encoding="utf-8")
    assert "Ω ™" in content
    assert content.endswith("}\n")
    keys = list(json.loads(content))
    assert keys[:3] == ["name", "kind", "config"]
    designed = "name kind config seed revision device precision date seconds parameters metrics"
    assert set(designed.split()) <= set(keys)


def test_values_of_other_libraries_become_plain(tmp_path):
    written = record(
        seed=np.int64(4),
        parameters=torch.tensor(7),
        seconds=np.float32(0.5),
        config={"path": Path("a") / "b", "sizes": (1, 2), "clip": float("inf")},
        metrics={
            "test_bpc": torch.tensor(2.5, dtype=torch.float64),
            "passes": np.int32(3),
            "residual_bpc": torch.tensor([3.0, 2.0]),
        },
    )
    assert written.config == {"path": str(Path("a") / "b"), "sizes": [1, 2], "clip": "inf"}
    assert written.metrics == {"test_bpc": 2.5, "passes": 3, "residual_bpc": [3.0, 2.0]}
    assert (written.seed, written.parameters, written.seconds) == (4, 7, 0.5)
    assert read_record(write_record(tmp_path, written)) == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "text8/flow"}, r"name is 'text8/flow': expected at most 100 letters"),
        ({"name": ".hidden"}, "name is"),
        ({"name": ""}, "name is"),
        ({"name": "a" * 101}, "name is"),
        ({"kind": "two words"}, "kind is 'two words'"),
        ({"device": ""}, "device is"),
        ({"device": 3}, "device is 3: expected text"),
        ({"likelihood": "about"}, "expected exact or bound"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"parameters": 1.5}, "parameters is 1.5: expected a whole number"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": -1}, "seconds is -1"),
        ({"date": "yesterday"}, "date is 'yesterday': expected ISO 8601"),
        ({"date": "2026-01-31T12:00:00"}, "expected ISO 8601 in UTC"),
        ({"date": "2026-01-31T12:00:00+01:00"}, "expected ISO 8601 in UTC"),
        ({"config": [1]}, "config is"),
        ({"config": {"model": {"act": print}}}, "config.model.act is a builtin_function_or_method"),
        ({"config": {"a": {1: 2}}}, "config.a has the key 1"),
        ({"versions": {"torch": 2}}, "versions.torch is 2"),
        ({"metrics": {"bpc": 1.0}}, "metrics.bpc is unknown: expected one of .*test_bpc"),
        ({"metrics": {"test_bpc": float("nan")}}, "metrics.test_bpc is nan: expected a finite"),
        ({"metrics": {"test_bpc": float("inf")}}, "metrics.test_bpc is inf"),
        ({"metrics": {"test_bpc": True}}, "metrics.test_bpc is True"),
        ({"metrics": {"test_bpc": "2.5"}}, "metrics.test_bpc is '2.5'"),
        ({"metrics": {"test_bpc": None}}, "metrics.test_bpc is None"),
        ({"metrics": {"passes": 1.5}}, "metrics.passes is 1.5: expected a whole number"),
        ({"metrics": {"passes": -1}}, "metrics.passes is -1"),
        ({"metrics": {"residual_bpc": 2.0}}, "metrics.residual_bpc is 2.0: expected a list"),
        ({"metrics": {"residual_bpc": [1.0, float("nan")]}}, "metrics.residual_bpc is"),
        ({"metrics": {"samples": "to be"}}, "metrics.samples is 'to be': expected a list of text"),
        ({"metrics": {"samples": [1]}}, "metrics.samples is"),
        ({"metrics": {"characters": 5}}, "metrics.characters is 5: expected a mapping"),
        ({"metrics": {"characters": {"test": 1.5}}}, "metrics.characters is"),
    ],
)
def test_wrong_entries_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        record(**changes)


def test_records_are_read_in_order_and_nothing_else_is(tmp_path):
    for name, seed in [("b", 0), ("a", 1), ("a", 0)]:
        write_record(tmp_path, record(name=name, seed=seed))
    (tmp_path / "table.md").write_text("no record")
    write_record(tmp_path / "inside", record())
    found = read_records(tmp_path)
    assert [(entry.name, entry.seed) for entry in found] == [("a", 0), ("a", 1), ("b", 0)]


def test_a_run_that_is_repeated_replaces_its_record(tmp_path):
    write_record(tmp_path, record())
    write_record(tmp_path, record(seconds=1.0))
    assert [entry.seconds for entry in read_records(tmp_path)] == [1.0]


def edited(tmp_path, edit):
    file = write_record(tmp_path, record())
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.pop("seed"), "lacks seed"),
        (lambda content: content.update(host="x"), "unknown key host"),
        (lambda content: content["metrics"].update(bpc=1), "metrics.bpc is unknown"),
        (lambda content: content["metrics"].update(test_bpc="low"), "metrics.test_bpc is 'low'"),
        (lambda content: content["metrics"].update(test_bpc=float("nan")), "metrics.test_bpc is"),
        (lambda content: content.update(parameters="many"), "parameters is 'many'"),
    ],
)
def test_a_spoilt_record_is_refused_by_file_and_key(tmp_path, edit, message):
    file = edited(tmp_path, edit)
    with pytest.raises(UserError, match=f"quickstart-3.json.*{message}") as caught:
        read_records(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b'{"name": "quick', b"\xff\xfe", b"[]", b"3"])
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json (is not JSON|holds a)"):
        read_records(tmp_path)


def test_what_cannot_be_written_is_the_user_s_to_mend(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file: File exists: give a folder"):
        write_record(tmp_path / "file", record())


def test_missing_places_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder"):
        read_records(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nothing\.json cannot be read: No such file"):
        read_record(tmp_path / "nothing.json")


def test_a_write_that_fails_leaves_the_old_record_and_nothing_else(tmp_path, monkeypatch):
    old = record()
    write_record(tmp_path, old)

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="disk full"):
        write_record(tmp_path, replace(old, seconds=1.0))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["quickstart-3.json"]  # noqa: PTH208
    assert read_records(tmp_path) == [old]


def test_a_killed_process_leaves_the_old_record(tmp_path):
    write_record(tmp_path, record())
    script = (
        "import os, sys\n"
        "from dataclasses import replace\n"
        "from dflows.records import read_records, write_record\n"
        "old, = read_records(sys.argv[1])\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "write_record(sys.argv[1], replace(old, seconds=1.0))\n"
    )
    root = Path(records.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    assert read_records(tmp_path) == [record(date=read_records(tmp_path)[0].date)]


def test_date_is_now_in_utc():
    before = datetime.now(UTC).replace(microsecond=0)
    date = datetime.fromisoformat(record().date)
    assert date.utcoffset() == timedelta(0)
    assert before <= date <= datetime.now(UTC)
