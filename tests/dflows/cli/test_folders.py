"""The folder of a run: no two runs share one."""

import os
import subprocess
import sys

import pytest

from dflows.cli.folders import RunFolder, new_version
from dflows.errors import UserError
from tests.commands import environment, everything_in, run_apart, small_config, write_text
from tests.training import trainer as make_trainer


def test_versions_go_on_from_the_greatest(tmp_path):
    for name in ("version_0", "version_7", "version_x", "other"):
        (tmp_path / name).mkdir()
    assert [new_version(tmp_path).name for _ in range(2)] == ["version_8", "version_9"]


def test_processes_that_begin_at_once_have_a_folder_each(tmp_path):
    script = (
        "import sys; from pathlib import Path; from dflows.cli.folders import new_version\n"
        "sys.stdin.readline()\n"
        "for _ in range(50): print(new_version(Path(sys.argv[1])).name)\n"
    )
    line = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(line, env=environment(), **pipes) for _ in range(2)]
    found = [name for process in started for name in process.communicate("\n")[0].split()]
    assert len(set(found)) == len(found) == 100


def claimed(tmp_path, **options):
    folder = RunFolder("small", **options)
    folder.claim(make_trainer(tmp_path))
    return folder


def test_a_trainer_that_fits_alone_has_one_too(tmp_path):
    folder = RunFolder("small")
    folder.setup(make_trainer(tmp_path), None, "fit")
    assert folder.path == tmp_path / "runs" / "small" / "version_0"
    folder.teardown(None, None, "fit")
    assert not folder.path.exists()


HOLD = (
    "import sys; from pathlib import Path; from dflows.cli.folders import RunFolder\n"
    "from tests.training import trainer\n"
    "folder = RunFolder('small', Path(sys.argv[1]))\n"
    "folder.claim(trainer(sys.argv[1])); print('held', flush=True); sys.stdin.read()\n"
)


def test_a_folder_that_another_run_is_at_work_in_is_refused_until_that_is_gone(tmp_path):
    folder = tmp_path / "version_0"
    folder.mkdir()
    line = [sys.executable, "-c", HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen(line, env=environment(), **pipes)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"process {other.pid} on .*is at work in {folder}: wait"):
        claimed(tmp_path, resumed=folder)
    other.kill()
    other.communicate()
    (folder / "last.ckpt").touch()
    claimed(tmp_path, resumed=folder).leave()
    assert everything_in(tmp_path) == ["version_0", "version_0/last.ckpt"]


def test_processes_that_were_started_from_outside_all_end_where_the_first_has_no_folder(tmp_path):
    """As under srun, which ends no process because another has failed."""
    config = small_config(tmp_path, write_text(tmp_path))
    folder = tmp_path / "runs" / "small" / "version_0"
    folder.mkdir(parents=True)
    held = claimed(tmp_path, resumed=folder)
    more = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.logger.version", 0)
    done = run_apart("fit", "--config", config, *more, cwd=tmp_path)
    held.leave()
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert f"process {os.getpid()} on" in errors[0]


def test_an_unused_folder_is_removed_and_a_used_one_is_not(tmp_path):
    claimed(tmp_path).leave()
    assert everything_in(tmp_path) == []
    folder = claimed(tmp_path)
    (folder.path / "config.yaml").touch()
    folder.leave()
    assert everything_in(tmp_path / "runs" / "small") == ["version_0", "version_0/config.yaml"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_cannot_be_written_in_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied: give a folder that can be written in"):
        claimed(tmp_path)
