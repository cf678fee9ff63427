"""Ctrl-C in the seconds in which a command imports what it needs."""

import os
import signal
import sys

__all__ = ["interruptible", "started"]


def interruptible() -> None:
    """Lets Ctrl-C end a command that is being started in one line; nothing else is changed.

    There is nothing to lose yet, and an interrupted import shows all that it is in. What is no
    command of dflows, but imports it, is left alone.
    """
    _, _, command = " ".join(sys.orig_argv).partition(" -m ")
    starts = sys.argv[:1] == ["-m"] and command.startswith("dflows.")
    if starts and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"error: interrupted\n")
    os._exit(128 + signal.SIGINT)


def started() -> None:
    """Lets Ctrl-C raise an error again, as a command that has begun handles it."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
