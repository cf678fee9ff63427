"""Where a result comes from: the code, the libraries and the hardware, never the machine's name."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["describe_device", "revision", "versions"]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def revision() -> str:
    """Finds out which code is running.

    Returns:
        The commit of the checkout that dflows is imported from, with ``-dirty`` appended where
        tracked files, other than those in ``results``, differ from it; ``dflows-VERSION`` where
        dflows is installed without its repository.
    """
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    commit = _git("rev-parse", "HEAD") if tracked else None
    if not commit:
        return f"dflows-{versions()['dflows']}"
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)results"
    )
    return f"{commit}-dirty" if changed else commit


def versions() -> dict[str, str]:
    """Looks up the versions of what a result depends on, without importing it.

    Returns:
        Versions by name; a library that is not installed has the version ``unknown``.
    """
    found = {"python": platform.python_version()}
    for library in ("dflows", "torch", "pytorch-lightning"):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "unknown"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def describe_device(device: torch.device | str = "cpu", count: int = 1) -> str:
    """Describes the hardware that a run used, never the machine by its name.

    Args:
        device: The device of the model.
        count: Devices, or processes on a CPU, that the run used.

    Returns:
        The model of the GPU, or that of the processor with the threads of a process.

    Example:
        >>> describe_device("cpu", count=2).startswith("2 x ")
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    else:
        name = f"{_processor()} ({device.type})"
    return name if count == 1 else f"{count} x {name}"
