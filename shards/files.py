"""A shard as an open file: the local one, or one that was brought into a cache folder.

Between a shard's name and its index. Files in a cache folder never have a name (or lose it at once where the file
system cannot do that), so that nothing stays behind whatever kills the process. It fetches and unpacks nothing.
"""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vitscore.shards.reasons import MISSING, NOT_A_TAR, READ_ERROR, with_details
from vitscore.system.durable import writing


@dataclass
class ShardFile:
    """What a shard's name led to: an open file, a fault, or both where the file is not all that was there."""

    fd: int = -1
    num_bytes: int | None = None
    """Of the shard as it is stored: what was fetched, before it was unpacked."""
    fault: str | None = None
    notes: tuple[str, ...] = ()
    is_unpacked: bool = False

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_local(path: str) -> ShardFile:
    """Open a shard of this machine's file systems."""
    try:
        # A pipe or a device would block; only files are shards.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        return ShardFile(fault=MISSING)
    except OSError as error:
        return ShardFile(fault=with_details(READ_ERROR, error.strerror or str(error)))
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        return ShardFile(fault=with_details(NOT_A_TAR, "not a file"))
    return ShardFile(fd, found.st_size)


def new_file(folder: Path) -> int:
    """Open a new file without a name in `folder`, for reading and writing.

    Raises:
        SetupError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return os.dup(file.fileno())


def write_at(fd: int, data: bytes, offset: int, *, folder: Path) -> int:
    """Write all of `data` at `offset`; returns the offset behind it.

    Raises:
        SetupError: `folder` is full, or cannot be written.
    """
    view = memoryview(data)
    with writing(folder):
        while view:
            num_written = os.pwrite(fd, view, offset)
            offset += num_written
            view = view[num_written:]
    return offset
