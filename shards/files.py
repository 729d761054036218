"""Shards as open files: local files, or copies in a cache folder.

Sits between a shard's name and its index. Files in a cache folder have no name (on file systems that require one, the
name is removed right after opening), so nothing is left behind if the process is killed. Fetching and unpacking are
done in `remote`.
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
    """An opened shard: a file, a fault, or both if the file is incomplete."""

    fd: int = -1
    num_bytes: int | None = None
    """Size of the shard as stored or fetched, before unpacking."""
    fault: str | None = None
    notes: tuple[str, ...] = ()
    is_unpacked: bool = False

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_local(path: str) -> ShardFile:
    """Open a shard on a local file system."""
    try:
        # Without O_NONBLOCK, opening a pipe or a device would block.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        return ShardFile(fault=MISSING)
    except OSError as error:
        return ShardFile(fault=with_details(READ_ERROR, error.strerror or str(error)))
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        return ShardFile(fault=with_details(NOT_A_TAR, "not a file"))
    return ShardFile(fd, status.st_size)


def new_file(folder: Path) -> int:
    """Open a new unnamed file in `folder` for reading and writing.

    Raises:
        SetupError: the folder cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return os.dup(file.fileno())


def write_at(fd: int, data: bytes, offset: int, *, folder: Path) -> int:
    """Write all of `data` at `offset` and return the offset after it.

    Raises:
        SetupError: `folder` is full or cannot be written to.
    """
    view = memoryview(data)
    with writing(folder):
        while view:
            num_written = os.pwrite(fd, view, offset)
            offset += num_written
            view = view[num_written:]
    return offset
