"""Errors as users see them: one line, the key or file in it, and an exit code."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from dflows.errors import UserError

__all__ = ["DEBUG", "one_line", "run_command"]

DEBUG = "DFLOWS_DEBUG"
"""Environment variable that, set to 1, shows tracebacks."""

USAGE, FAILURE = 2, 1
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


def one_line(error: BaseException) -> str:
    """Returns the part of an error's message that says what to change, on one line."""
    message = error.message if isinstance(error, argparse.ArgumentError) else str(error)
    lines = [line.strip(" -") for line in str(message).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, argparse.ArgumentError):
        return lines[-1]
    return " ".join(lines)


def _raise_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run_command(main: Callable[[], None]) -> int:
    """Runs a command and shows what users did wrong as one line on the standard error.

    Args:
        main: The command.

    Returns:
        The exit code: 0; 2 for arguments and configurations that cannot be read; 1 for other
        mistakes; 130 and 143 for interruptions.
    """
    if os.environ.get(DEBUG) == "1":
        main()
        return 0
    # A process started in the background ignores interrupts until it is told otherwise.
    signal.signal(signal.SIGINT, _raise_interrupt)
    try:
        main()
    except argparse.ArgumentError as error:
        return _fail(one_line(error), USAGE)
    except (UserError, MisconfigurationException) as error:
        return _fail(one_line(error), FAILURE)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except SIGTERMException:
        return _fail("terminated", TERMINATED)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
