"""What a run prints, which is never worth the run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from dflows.errors import UserError

__all__ = ["patient_output", "plain_output"]


def plain_output() -> None:
    """Has characters escaped that the terminal or the file of the output has not."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # no stream, or one of other kind
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


class _Patient:
    """Creates a stream that takes everything, also when what it writes to is closed or full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes, as long as there is someone to read."""
        if self.error is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flushes, as long as there is someone to read."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = error
        # What the stream still holds goes nowhere, or Python would complain when it ends.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_output() -> Iterator[None]:
    """Lets a run go on when nobody reads what it prints any more.

    Raises:
        UserError: When all is done, if something could not be printed.
    """
    streams = [sys.stdout, sys.stderr]
    output, errors = (_Patient(stream) for stream in streams)
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", errors)
    try:
        yield
        output.flush()
    finally:
        sys.stdout, sys.stderr = streams
    if output.error is not None:
        raise UserError(
            f"the run is complete, and its figures could not be printed ({output.error.strerror}): "
            "they are in its record"
        )
