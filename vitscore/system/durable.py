"""Write files atomically and durably: temporary name, fsync, rename, fsync of the folder.

Every file of a run is written through this module. If a process is killed at any time, a reader sees the old file or
the new one, never a partial one. The same holds after a power loss between any two system calls, on a file system that
keeps flushed data. Temporary files are dotfiles named after the process that writes them: host, process id, start time.

Code that creates or removes folder entries must flush the folder before anything relies on them, because unflushed
entries reach the disk in any order. A call that a signal interrupts is repeated.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from vitscore.errors import SetupError

TEMPORARY_SUFFIX = ".tmp"
P = ParamSpec("P")
T = TypeVar("T")


def host_name() -> str:
    """Return this machine's name, with only characters that are safe in a file name."""
    return "".join(c if c.isalnum() else "-" for c in socket.gethostname()) or "host"


def temporary_name(path: Path) -> Path:
    """Return a path beside `path` that no other process uses; it holds host, process id and start time."""
    process_id = os.getpid()
    started = start_time(process_id)
    process = f"{process_id}" if started is None else f"{process_id}-{started}"
    return path.with_name(f".{path.name}.{host_name()}.{process}{TEMPORARY_SUFFIX}")


def sweep(folder: Path) -> int:
    """Remove temporary files of dead processes of this machine from `folder`; return how many.

    Files of live processes stay, and so do those of other machines, whose processes cannot be checked.
    """
    swept = 0
    for path in folder.glob(f".*.{host_name()}.*{TEMPORARY_SUFFIX}"):
        process_id, _, started = path.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[2].partition("-")
        if not process_id.isdecimal() or (started and not started.isdecimal()):
            continue
        if not is_alive(int(process_id), started=int(started) if started else None):
            uninterrupted(path.unlink, missing_ok=True)
            swept += 1
    return swept


def is_alive(process_id: int, *, started: int | None = None) -> bool:
    """Return whether a process of this machine is alive.

    Args:
        process_id: the process id.
        started: its start time, if known; a process with another start time reuses the id.
    """
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # It exists and belongs to another user.
    stat = process_stat(process_id)
    if stat is None:
        return True
    # A zombie, a dead process whose parent has not waited for it, keeps its id but no longer writes.
    return stat[0] not in "ZX" and started in (None, int(stat[19]))


def start_time(process_id: int) -> int | None:
    """Return a process's start time in clock ticks since boot; None if the system does not provide it."""
    stat = process_stat(process_id)
    return None if stat is None else int(stat[19])


def process_stat(process_id: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the third on (state, parent, ...); None if there are none."""
    try:
        with open(f"/proc/{process_id}/stat", "rb") as file:
            # The second field is the program's name in parentheses and may hold any character.
            fields = file.read().decode("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields if len(fields) > 19 and fields[19].isdecimal() else None


def uninterrupted(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Repeat a system call while signals interrupt it; Python does so only for some calls."""
    while True:
        try:
            return call(*args, **kwargs)
        except InterruptedError:
            continue


class NewFile:
    """A file written under a temporary name; `commit` gives it its final name.

    It is unbuffered: after `write` returns, the data is with the operating system. pyarrow can write to it, and should:
    pyarrow's files fail on a call that a signal interrupts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = temporary_name(path)
        self._is_discarded = False
        self._file = open(self.temporary, "wb", buffering=0)

    @property
    def closed(self) -> bool:
        return not self._is_discarded and self._file.closed

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all of `data`; a discarded file ignores it, because libraries still write when they close."""
        view = memoryview(data).cast("B")
        num_bytes = len(view)
        while view and not self._is_discarded:
            view = view[self._file.write(view) or 0 :]
        return num_bytes

    def flush(self) -> None:
        pass

    def commit(self) -> None:
        """Flush the content to disk, rename the file, and flush the folder.

        Raises:
            OSError: `path` is unchanged, or is the whole new file if only the folder could not be flushed.
        """
        try:
            os.fsync(self._file.fileno())
            self._close()
            uninterrupted(os.replace, self.temporary, self.path)
        except BaseException:
            self.discard()
            raise
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Delete the temporary file."""
        self._is_discarded = True
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            uninterrupted(self.temporary.unlink)

    def _close(self) -> None:
        # On Linux an interrupted close has closed the file.
        with contextlib.suppress(InterruptedError):
            self._file.close()


@contextlib.contextmanager
def durable_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` on success, remove it on failure.

    This is for writers that need a path; other writers use `NewFile`.

    Raises:
        OSError: the file could not be written; `path` is unchanged.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        sync_file(temporary)
        uninterrupted(os.replace, temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            uninterrupted(temporary.unlink)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn an OSError into a one-line error that a user can act on.

    Raises:
        SetupError: exit code 4; the file that was being written is unchanged.
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
    """Write `data` to `path`, atomically and durably."""
    file = NewFile(path)
    try:
        file.write(data)
    except BaseException:
        file.discard()
        raise
    file.commit()


def write_json_durably(path: Path, document: Any) -> None:
    """Write `document` as indented JSON with a final newline, atomically and durably; NaN is an error."""
    write_bytes_durably(path, json_bytes(document))


def json_bytes(document: Any) -> bytes:
    """Return the bytes that `write_json_durably` writes."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def make_folder_durably(path: Path) -> None:
    """Make a folder and its missing parents so that they survive a power loss.

    The parent is flushed even if `path` exists: the process that made it may have died before the flush.
    """
    if not path.parent.is_dir():
        make_folder_durably(path.parent)
    uninterrupted(path.mkdir, exist_ok=True)
    # A folder that may be entered but not read (as `/scratch` may be) cannot be opened and flushed.
    with contextlib.suppress(PermissionError):
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power loss.

    Some file systems do not support this and return an error, which is ignored: there is no alternative.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        sync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        # Nothing was written through this descriptor, so an error from close means nothing.
        with contextlib.suppress(OSError):
            os.close(fd)
