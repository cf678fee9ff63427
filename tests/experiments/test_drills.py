"""Two processes: whatever starts them, and whatever happens to one or both, all end as promised."""

import re
import time

import pytest

from dflows.records import read_record, read_records
from experiments import drilling, drills
from experiments.drilling import PATIENCE, Drill, Ended, Start, run_drill, said_once
from experiments.drills import DRILLS, main
from experiments.faults import MOMENT
from experiments.reports.drills import render

BY_DEFAULT = {
    "lightning-raised-train-1",
    "lightning-terminated-train-1",
    "lightning-interrupted-valid-1",
    "fsdp-terminated-valid-1",
}


def listed(drill):
    marks = [] if drill.name in BY_DEFAULT else [pytest.mark.slow]
    return pytest.param(drill, id=drill.name, marks=marks)


@pytest.mark.parametrize("drill", [*map(listed, DRILLS)])
def test_all_end_as_promised(drill, tmp_path):
    _, _, wrong = run_drill(drill, tmp_path)
    assert not wrong, (tmp_path / drilling.ERRORS).read_text(encoding="utf-8")


def test_names_are_those_of_records():
    names = {drill.name for drill in DRILLS}
    assert len(names) == len(DRILLS)
    assert names >= BY_DEFAULT
    # One row of the table tells one thing.
    for happens in {drill.happens for drill in DRILLS}:
        same = [drill for drill in DRILLS if drill.happens == happens]
        assert len({(drill.promise, drill.within) for drill in same}) == 1


def passes(ended):
    yield from ()


def python(*programs, check=passes, name="fake", within=PATIENCE):
    starts = [Start(("-c", program)) for program in programs]
    return Drill(name, "nothing", "it ends", lambda: starts, check, within)


CHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {program!r}], {more})"


@pytest.mark.parametrize("more", ["", "start_new_session=True"])
def test_a_process_that_is_left_is_found_and_ended(more, tmp_path, monkeypatch):
    running, file = drilling.running, tmp_path / "child"
    waits = f"import time; open({str(file)!r}, 'w').close(); time.sleep(600)"

    def until_there(mark):
        if file.is_file():
            monkeypatch.setattr(drilling, "PATIENCE", 0.0)
            monkeypatch.setattr(drilling, "running", running)
            marks.append(mark)
        return running(mark)

    marks = []
    monkeypatch.setattr(drilling, "running", until_there)
    _, _, wrong = run_drill(python(CHILD.format(program=waits, more=more)), tmp_path)
    assert re.fullmatch(r"\[.*\] still ran after 0 seconds", *wrong)
    deadline = time.monotonic() + PATIENCE
    while running(marks[0]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_seconds_count_from_what_went_wrong_to_the_end_of_the_last(tmp_path):
    program = f"import pathlib, time; time.sleep(0.5); pathlib.Path({MOMENT!r}).touch()"
    later = CHILD.format(program="import time; time.sleep(0.5)", more="")
    begin = time.time()
    _, seconds, wrong = run_drill(python(f"{program}\n{later}"), tmp_path)
    assert not wrong
    assert 0.4 <= seconds <= time.time() - begin - 0.4


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ("warning\nerror: the loader broke\n", False),
        ("error: the loader broke\nerror in process 1: the loader broke\n", True),
        ("error: another\n", True),
        ("the loader broke\n", True),
    ],
)
def test_an_error_is_said_once(told, wrong, tmp_path):
    ended = Ended([1], "", told, tmp_path)
    assert bool([*said_once(ended, "the loader broke")]) == wrong


def test_the_command_tells_and_records_what_ended_as_promised(tmp_path, monkeypatch, capfd):
    def fails(ended):
        yield f"exit codes {ended.codes}"

    fakes = [
        python("raise SystemExit(2)", name="good"),
        python("import sys; sys.exit('what was said')", name="bad", check=fails),
        python("", name="late", within=0.0),
        python("", name="other"),
    ]
    monkeypatch.setattr(drills, "DRILLS", fakes)
    monkeypatch.chdir(tmp_path)
    for name in ("good", "bad"):
        (tmp_path / "results" / "drills").mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / "drills" / f"{name}-0.json").write_text("old")
    assert main(["--only", "o"]) == 0  # good, other
    assert main(["--only", "d"]) == 1  # good, bad
    assert main(["--only", "late"]) == 1
    assert main(["--only", "none"]) == 1
    told = capfd.readouterr()
    assert re.search(r"│ good +│ 2 +│ \d+\.\d +│ 300 │ as promised", told.out)
    assert "what was said" in told.err
    for line in (
        "error: bad did not end as promised",
        "error: late did not end as promised",
        "no drill has that in its name: there are good, bad, late, other",
    ):
        assert line in told.err
    folder = tmp_path / "results" / "drills"
    assert {path.name for path in folder.iterdir()} == {"good-0.json", "other-0.json"}
    assert read_record(folder / "good-0.json").metrics["exit_codes"] == [2]
    table = render(read_records(folder))
    assert re.search(r"\| nothing: it ends \| 2 \| 0, 2 \| \d+\.\d \| 300 \|", table)
