"""Errors as users see them: one line with the key or file in it, and an exit code."""

import argparse
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable
from importlib import import_module

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.exceptions import SIGTERMException

from dflows.cli.output import plain_output
from dflows.cli.slurm import RequeueRequest
from dflows.errors import UserError, chain_of
from dflows.starting import started

__all__ = ["DEBUG", "one_line", "run_command"]

DEBUG = "DFLOWS_DEBUG"
"""Environment variable that, set to 1, shows tracebacks."""

USAGE, FAILURE = 2, 1
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
REQUEUED = 128 + signal.SIGUSR1

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_CALLABLE = re.compile(
    r"Type .* expects a function or a callable class: .*Got value: Namespace\(class_path='([^']+)'",
    re.DOTALL,
)
_MADE = re.compile(
    r"Does not validate against any of the Union.*Given value: Namespace\(class_path='([^']+)'",
    re.DOTALL,
)
_GROUP = re.compile(r"Group '([\w.]+)' does not|unrecognized arguments: --([\w.]+)\.\w+")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_UNKNOWN = re.compile(r"not accept|unrecognized argument")


def _joined(error: BaseException) -> str:
    """Returns a message on one line, without what a terminal would obey."""
    words = " ".join(str(error).split()) or type(error).__name__
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in words)


def _keys_of(class_path: str, group: str) -> str:
    """Returns the keys in a group of a class, or an empty string if they are unknown."""
    module, _, name = class_path.rpartition(".")
    try:
        owner = getattr(import_module(module), name)
        for part in filter(None, group.split(".")):
            owner = inspect.signature(owner).parameters[part].annotation
        parameters = inspect.signature(owner).parameters.values()
    except (ImportError, AttributeError, KeyError, ValueError, TypeError):
        return ""
    named = [entry.name for entry in parameters if entry.kind not in _VARIADIC]
    return f"its keys are {', '.join(named)}" if named else "it takes no keys"


def one_line(error: BaseException) -> str:
    """Returns the message of an error, for its user, on one line.

    jsonargparse raises a chain of errors, one for every level of a configuration that it came
    through: their keys are the place, and the last of them is what is wrong.
    """
    chain = list(chain_of(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return _joined(cause)
    if not isinstance(error, argparse.ArgumentError):
        # What fails where a class is made is shown with all that the class was given.
        made = _MADE.match(str(error))
        return f"{made[1]}: {_joined(chain[-1])}" if made else _joined(error)
    keys: list[str] = []
    class_path, innermost = "", False
    for cause in chain:
        text = str(cause)
        if (found := _KEY.match(text)) and found[1] not in keys[-1:]:
            keys.append(found[1])
            innermost = False
        if found := _CLASS.match(text) or _CALLABLE.match(text):
            class_path, innermost = found[1], True
    message = _joined(chain[-1])
    where = ".".join(keys)
    if class_path and class_path not in message:
        where = f"{where} ({class_path})"
    if _UNKNOWN.search(message):
        group = next(filter(None, found.groups()), "") if (found := _GROUP.match(message)) else ""
        known = _keys_of(class_path, group) if innermost else ""
        message += f": {known or '--help lists all keys'}"
    return f"{where}: {message}" if where else message


def run_command(main: Callable[[], None]) -> int:
    """Runs a command and shows what went wrong as one line on the standard error.

    Args:
        main: The command.

    Returns:
        The exit code: 0; 2 for arguments and configurations that cannot be read; 1 for everything
        else that failed; 130, 143 and 138 for signals that interrupt, terminate and requeue it.
    """
    plain_output()
    started()
    if os.environ.get(DEBUG) == "1":
        main()
        return 0
    try:
        main()
    except argparse.ArgumentError as error:
        of_user = any(isinstance(cause, UserError) for cause in chain_of(error))
        return _fail(one_line(error), FAILURE if of_user else USAGE)
    except KeyboardInterrupt as error:
        return _fail(_with_notes("interrupted", error), INTERRUPTED)
    except SIGTERMException as error:
        return _fail(_with_notes("terminated", error), TERMINATED)
    except RequeueRequest as error:
        return _fail(_with_notes("the time of the job is up", error), REQUEUED)
    except BrokenPipeError:
        return _fail("the output was closed before all was printed", FAILURE)
    except SystemExit as stop:
        return _exit_code(stop)
    except Exception as error:  # noqa: BLE001 - the last resort: the message, and how to see more
        known = any(isinstance(cause, UserError) for cause in chain_of(error))
        if known or isinstance(error, MisconfigurationException):
            return _fail(_with_notes(one_line(error), error), FAILURE)
        message = f"{type(error).__name__}: {one_line(error)} (set {DEBUG}=1 to see where)"
        return _fail(message, FAILURE)
    return 0


def _exit_code(stop: SystemExit) -> int:
    # Lightning leaves by SystemExit when it is interrupted.
    if any(isinstance(cause, KeyboardInterrupt) for cause in chain_of(stop)):
        return _fail(_with_notes("interrupted", stop), INTERRUPTED)
    return stop.code if isinstance(stop.code, int) else int(bool(stop.code))


def _with_notes(message: str, error: BaseException) -> str:
    """Adds what a command has noted of an error: how its run is resumed."""
    notes = [note for cause in chain_of(error) for note in getattr(cause, "__notes__", ())]
    return ": ".join([message, *notes[:1]])


def _fail(message: str, code: int) -> int:
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    rank = next((rank for rank in ranks if rank), "0")
    place = "" if rank == "0" else f" in process {rank}"
    # A signal stops all processes, and one tells of it.
    if rank == "0" or code not in (INTERRUPTED, TERMINATED, REQUEUED):
        print(f"error{place}: {message}", file=sys.stderr, flush=True)
    return code
