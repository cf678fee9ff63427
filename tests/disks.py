"""Disks that are full, as a run meets them."""

import errno
import os

from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

from dflows import files
from dflows.cli import checkpoints


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch, room):
    """Leaves room for so many bytes of checkpoints."""

    class Full(checkpoints._File):
        written = 0

        def write(self, data):
            Full.written += len(data)
            if Full.written > room:
                self.error = full()
                raise self.error
            return super().write(data)

    monkeypatch.setattr(checkpoints, "_File", Full)


def fill_for(monkeypatch, name, times=1):
    """Leaves no room for one file of a run, from the n-th time on that it is written."""
    real, left = files._flush, [times]

    def flush(path):
        if path.name.startswith(f".{name}."):
            left[0] -= 1
            if left[0] <= 0:
                raise full()
        real(path)

    monkeypatch.setattr(files, "_flush", flush)


def fill_for_log(monkeypatch, times):
    """Leaves no room for the log, from the n-th time on that it is written."""
    real, left = LocalFileSystem.append, [times]

    def append(self, *arguments):
        left[0] -= 1
        if left[0] <= 0:
            raise full()
        real(self, *arguments)

    monkeypatch.setattr(LocalFileSystem, "append", append)
