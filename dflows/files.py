"""Files that are there whole or not at all."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Writes a temporary file, and moves it into place when it is complete.

    Args:
        file: The place, in a folder that exists.

    Yields:
        The path to write to, in the same folder. After an error it is gone, and what was at the
        place is still there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "note.txt")
        ...     with atomic_write(file) as unfinished:
        ...         written = unfinished.write_text("whole")
        ...     file.read_text()
        'whole'
    """
    # Not with the file's own ending: what a killed process leaves must not be taken for a file.
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
