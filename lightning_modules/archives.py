"""Files of checkpoints: sealed by a checksum, and looked through before anything is unpacked.

They are zip archives, whose members have checksums that torch does not look at; and between the
members lie bytes without any. So a comment at the end, which every reader of archives passes over,
holds a checksum of all that stands before it.
"""

import os
import pickletools
import zlib
from pathlib import Path
from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile

__all__ = ["check_archive", "seal"]

BLOCK = 1 << 20
_MARK = b"dflows crc32 "
_LENGTH = len(_MARK) + 8


def seal(path: str | os.PathLike[str]) -> None:
    """Ends the file of a checkpoint with a checksum of all before it, and writes it through.

    Args:
        path: What `torch.save` wrote: an archive without a comment.
    """
    with Path(path).open("r+b") as file:
        # An archive ends with the length of its comment, in two bytes.
        size = file.seek(-2, os.SEEK_END) + 2
        file.write(_LENGTH.to_bytes(2, "little"))
        comment = _comment(file, size)
        file.seek(size)
        file.write(comment)
        file.flush()
        os.fsync(file.fileno())


def check_archive(path: str | os.PathLike[str]) -> None:
    """Refuses a file that is not as it was written, or would take more memory than it has bytes.

    Args:
        path: The file.

    Raises:
        zipfile.BadZipFile: If it does, or is no archive.
        OSError: If it cannot be read.
    """
    with Path(path).open("rb") as file, ZipFile(file) as archive:
        size = file.seek(0, os.SEEK_END)
        members = archive.infolist()
        packed = any(member.compress_type != ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > size:
            raise BadZipFile("its parts are packed, and torch packs none")
        if archive.comment.startswith(_MARK):
            whole = archive.comment == _comment(file, size - _LENGTH)
        else:  # of another writer
            whole = archive.testzip() is None
        if not whole:
            raise BadZipFile("its checksum is another")
        for member in members:
            if member.filename.endswith(".pkl"):
                _check_pickle(archive.read(member))


def _comment(file: BinaryIO, size: int) -> bytes:
    """Returns the seal of the first bytes of a file."""
    checksum = 0
    file.seek(0)
    while size > 0 and (block := file.read(min(size, BLOCK))):
        checksum, size = zlib.crc32(block, checksum), size - len(block)
    return _MARK + b"%08x" % checksum


def _check_pickle(pickled: bytes) -> None:
    """Refuses what torch would make without a tensor's storage: bytes as many as a number says."""
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise BadZipFile("it holds a bytearray")
