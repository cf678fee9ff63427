"""Jobs of SLURM: one that is requeued goes on in its run."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

from dflows.errors import UserError
from dflows.files import write_text

__all__ = ["JOB", "RequeueRequest", "environment", "note_job", "requeue", "run_of_job"]

JOB = "slurm.json"
"""The file in the folder of a run that says which command of which job works there."""

SECONDS = 60
"""How long SLURM may take to answer."""


class RequeueRequest(BaseException):
    """What ends a run so that SLURM starts its job again."""


def environment() -> SLURMEnvironment | None:
    """Returns what Lightning has to know of the job, if this is a process of one.

    Lightning's own requeueing is off: it saves wherever the signal finds it, within a step too, and
    into the working folder, where every other run takes it for its own.

    Raises:
        UserError: If the job has settings that Lightning does not support.
    """
    if not SLURMEnvironment.detect():
        return None
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise UserError(str(error)) from None


def _identity(command: Sequence[str]) -> dict[str, object] | None:
    job = os.environ.get("SLURM_JOB_ID")
    return None if job is None else {"job": job, "command": list(command)}


def note_job(folder: Path, command: Sequence[str]) -> None:
    """Writes into the folder of a run which job works there, if one does.

    Args:
        folder: The folder.
        command: The arguments of the command.
    """
    if (identity := _identity(command)) is not None:
        write_text(folder / JOB, json.dumps(identity, indent=2) + "\n")


def run_of_job(parent: Path, command: Sequence[str]) -> Path | None:
    """Finds the folder in which this command of this job was at work before it was requeued.

    Args:
        parent: The folder that runs lie in, at any depth.
        command: The arguments of the command.

    Returns:
        The folder that was worked in last; none if the job was not requeued, or there is none.
    """
    identity = _identity(command)
    if identity is None or not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return None
    found = [file for file in parent.rglob(JOB) if _holds(file, identity)]
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else None


def _holds(file: Path, identity: dict[str, object]) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")) == identity)
    except (OSError, ValueError):
        return False


def requeue() -> str:
    """Asks SLURM to start the job again, and returns its number.

    Raises:
        UserError: If it does not.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    try:
        subprocess.run(  # noqa: S603 - the job's own number
            ["scontrol", "requeue", job],  # noqa: S607 - wherever the cluster has it
            check=True,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = " ".join(str(getattr(error, "stderr", None) or error).split())
        raise UserError(f"job {job} was not requeued ({said}): submit it again") from None
    return job
