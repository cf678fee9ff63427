"""Disks that are full, as a run meets them."""

import errno
import os

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
