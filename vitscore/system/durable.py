"""Files that are whole or not there: a temporary name, fsync, rename, fsync of the folder.

Everything a run leaves behind goes through here. Whatever is killed, and whenever, a reader sees the old file or the
new one, never half of one; and so it is after a power loss between any two system calls, on a file system that keeps
what was flushed. Temporary files are dotfiles that name the process that wrote them: host, process id, start time.

Whoever creates or removes folder entries flushes the folder before anything is built upon them: the order in which
unflushed entries reach the disk is anybody's guess. A call that a signal interrupted is made again.
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
    """This machine's name, fit for a file's."""
    return "".join(c if c.isalnum() else "-" for c in socket.gethostname()) or "host"


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process writes to: host, process id and start time are part of it."""
    process_id = os.getpid()
    started = start_time(process_id)
    process = f"{process_id}" if started is None else f"{process_id}-{started}"
    return path.with_name(f".{path.name}.{host_name()}.{process}{TEMPORARY_SUFFIX}")


def sweep(folder: Path) -> int:
    """Remove the temporary files that dead processes of this machine left in `folder`; returns how many.

    Those of living processes stay, and those of other machines, whose processes cannot be asked.
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
    """Whether a process of this machine runs under this id.

    Args:
        process_id: the id.
        started: its start time where known; a process that started at another time only inherited the id.
    """
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # It is there, and another user's.
    stat = process_stat(process_id)
    if stat is None:
        return True
    # A dead process that its parent has not asked after yet still has its id; it writes nothing any more.
    return stat[0] not in "ZX" and started in (None, int(stat[19]))


def start_time(process_id: int) -> int | None:
    """When a process started, in the kernel's ticks since the machine did; None where the system does not tell."""
    stat = process_stat(process_id)
    return None if stat is None else int(stat[19])


def process_stat(process_id: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on (state, parent, ...); None where there are none."""
    try:
        with open(f"/proc/{process_id}/stat", "rb") as file:
            # The second field is the program's name, in brackets, and may hold anything.
            fields = file.read().decode("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields if len(fields) > 19 and fields[19].isdecimal() else None


def uninterrupted(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Make a system call again for as long as a signal interrupts it; Python does so only for some."""
    while True:
        try:
            return call(*args, **kwargs)
        except InterruptedError:
            continue


class NewFile:
    """A file that is being written under a temporary name; `commit` makes it the file of its name.

    Not buffered: what `write` has returned from is the system's. Small enough a file object for pyarrow to write to,
    whose own files give up at a call that a signal interrupts.
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
        """Write all of `data`; a discarded file swallows what a library still has to say at its end."""
        view = memoryview(data).cast("B")
        num_bytes = len(view)
        while view and not self._is_discarded:
            view = view[self._file.write(view) or 0 :]
        return num_bytes

    def flush(self) -> None:
        pass

    def commit(self) -> None:
        """Flush the content to the disk, give the file its name, flush the folder.

        Raises:
            OSError: `path` is as it was before; or the whole new file, where only the folder could not be flushed.
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
        """Drop the file; nothing stays of it."""
        self._is_discarded = True
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            uninterrupted(self.temporary.unlink)

    def _close(self) -> None:
        # A close that a signal interrupts has closed the file.
        with contextlib.suppress(InterruptedError):
            self._file.close()


@contextlib.contextmanager
def durable_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `path` for good, on failure it is removed.

    For what must have a path; `NewFile` asks less of the writer.

    Raises:
        OSError: the file could not be written; `path` is as it was before.
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
    file = NewFile(path)
    try:
        file.write(data)
    except BaseException:
        file.discard()
        raise
    file.commit()


def write_json_durably(path: Path, document: Any) -> None:
    """Write `document` as indented JSON with a final newline, whole or not at all; NaN is an error."""
    write_bytes_durably(path, json_bytes(document))


def json_bytes(document: Any) -> bytes:
    """What `write_json_durably` writes."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def make_folder_durably(path: Path) -> None:
    """Make a folder, and those above it that are missing, so that they survive a power loss.

    The folder above is flushed also where `path` is there already: who made it may have died before doing so.
    """
    if not path.parent.is_dir():
        make_folder_durably(path.parent)
    uninterrupted(path.mkdir, exist_ok=True)
    # A folder that may be entered but not read, as `/scratch` may be, cannot be opened to be flushed.
    with contextlib.suppress(PermissionError):
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power loss.

    Some file systems cannot, and say so; there is nothing else that could be done on them.
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
        # Nothing was written through this descriptor: its close has nothing to tell.
        with contextlib.suppress(OSError):
            os.close(fd)
