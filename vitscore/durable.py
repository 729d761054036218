"""Files that are whole or not there: a temporary name, fsync, rename, fsync of the folder.

Everything a run leaves behind goes through here. Whatever is killed, and whenever, a reader sees the old file or the
new one, never half of one. Temporary files are dotfiles that name the process that wrote them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitscore.errors import SetupError

TEMPORARY_SUFFIX = ".tmp"


def host_name() -> str:
    """This machine's name, fit for a file's."""
    return "".join(c if c.isalnum() else "-" for c in socket.gethostname()) or "host"


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process writes to: host and process id are part of it."""
    return path.with_name(f".{path.name}.{host_name()}.{os.getpid()}{TEMPORARY_SUFFIX}")


def sweep(folder: Path) -> int:
    """Remove the temporary files that dead processes of this machine left in `folder`; returns how many.

    Those of living processes stay, and those of other machines, whose processes cannot be asked.
    """
    swept = 0
    for path in folder.glob(f".*.{host_name()}.*{TEMPORARY_SUFFIX}"):
        process_id = path.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[2]
        if process_id.isdecimal() and not is_alive(int(process_id)):
            path.unlink(missing_ok=True)
            swept += 1
    return swept


def is_alive(process_id: int) -> bool:
    """Whether a process of this machine runs under this id."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def durable_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `path` for good, on failure it is removed.

    Raises:
        OSError: the file could not be written; `path` is as it was before.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn an OSError of the system into the one line that a user can act on.

    Raises:
        SetupError: exit code 4; what was being written is as it was before.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise SetupError(
            "cannot write",
            where=str(where),
            got=os.strerror(error.errno) if error.errno else str(error),
            next_step=("Free some space; " if is_full else "Check the folder; ")
            + "the same command goes on from the parts that are done.",
        ) from error


def write_bytes_durably(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with durable_path(path) as temporary:
        temporary.write_bytes(data)


def write_json_durably(path: Path, document: Any) -> None:
    """Write `document` as indented JSON with a final newline, whole or not at all; NaN is an error."""
    write_bytes_durably(path, json_bytes(document))


def json_bytes(document: Any) -> bytes:
    """What `write_json_durably` writes."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power loss."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
