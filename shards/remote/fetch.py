"""Fetch one remote shard: a URL or a command in, a file in the cache folder out.

Sits between the stores and the index. A failed attempt keeps the bytes that it received. The next attempt resumes after
them if the server proves that the file is unchanged, and starts over otherwise. The length is checked, and the store's
checksum if it has one. A shard that cannot be fetched has a fault; no exception is raised.
"""

from __future__ import annotations

import hashlib
import io
import os
import select
import signal
import subprocess
import threading
import time
from pathlib import Path

from vitscore.shards.files import ShardFile, new_file, write_at
from vitscore.shards.reasons import MISSING, UNREACHABLE, with_details
from vitscore.shards.redaction import PIPE, public_name
from vitscore.shards.remote import web
from vitscore.shards.remote.retries import Abandoned, Failure, failed_status, retry
from vitscore.shards.remote.stores import is_web, object_info, object_range
from vitscore.shards.remote.web import CONTENT_RANGE, FileInfo, info_in, run_async, web_filesystem
from vitscore.shards.shard import Shard

CHUNK_BYTES = 8 << 20
"""Size of the ranges that are requested from an object store."""
COMMAND_BYTES = 1 << 20
CANNOT_RUN = (126, 127)
"""Exit codes of a shell for a command that does not exist or is not executable."""


def fetch(shard: Shard, *, folder: Path, stop: threading.Event, not_md5: set[str]) -> ShardFile:
    """Fetch a shard, with up to `retries.TRIES` attempts.

    Args:
        shard: a remote shard.
        folder: the folder of the new, unnamed file.
        stop: aborts the fetch when set.
        not_md5: remote folders whose ETags look like MD5 but are not; the fetch adds to it.

    Raises:
        SetupError: the folder is full or cannot be written to.
        Abandoned: `stop` was set.
    """
    fetching = _Fetch(shard, new_file(folder), folder, stop, not_md5)
    try:
        retry(fetching.run_once, stop=stop)
    except Failure as failure:
        fetching.close()
        return ShardFile(fault=MISSING if failure.is_gone else with_details(UNREACHABLE, str(failure)))
    except BaseException:
        fetching.close()
        raise
    return ShardFile(fetching.fd, fetching.num_bytes, notes=fetching.notes)


class _Fetch:
    """The state of one fetch: the file, and the server's information on the bytes in it."""

    def __init__(self, shard: Shard, fd: int, folder: Path, stop: threading.Event, not_md5: set[str]) -> None:
        self.shard = shard
        self.url = shard.path
        self.fd = fd
        self.folder = folder
        self.stop = stop
        self.not_md5 = not_md5
        self.num_bytes = 0
        self.info = FileInfo()
        """The store's information on the file that the bytes belong to."""
        self.validator: str | None = None
        """The ETag or date that identifies the file; a resumed download must have the same."""
        self.last_digest = ""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Discard the file.

        The lock keeps an abandoned request, whose thread may still run, from writing to a reused descriptor.
        """
        with self._lock:
            os.close(self.fd)
            self.fd = -1

    @property
    def notes(self) -> tuple[str, ...]:
        listed, etag = self.shard.etag, self.info.etag
        return ("changed after it was listed",) if listed and etag and listed != etag else ()

    def run_once(self) -> None:
        """Make one attempt.

        Raises:
            Failure: the attempt failed; another one may succeed.
        """
        if self.url.startswith(PIPE):
            self._run_command()
        elif is_web(self.url):
            run_async(self.url, self._get(), loop=web_filesystem().loop, stop=self.stop)
        else:
            self._copy_object()
        self._check_length(self.num_bytes, restarts=self.num_bytes > (self.info.num_bytes or 0))
        self._check_content()

    def _restart(self, info: FileInfo | None = None, validator: str | None = None) -> None:
        with self._lock:
            if self.fd < 0:
                raise Abandoned
            os.ftruncate(self.fd, 0)
        self.num_bytes = 0
        self.info, self.validator = info or FileInfo(), validator

    def _write(self, data: bytes) -> None:
        with self._lock:
            if self.fd < 0:
                raise Abandoned
            self.num_bytes = write_at(self.fd, data, self.num_bytes, folder=self.folder)

    async def _get(self) -> None:
        """Download the missing bytes by HTTP, as a range if there are bytes to resume from."""
        headers = {}
        if self.num_bytes and self.validator:
            headers = {"Range": f"bytes={self.num_bytes}-", "If-Range": self.validator}
        async with await web.request("GET", self.url, headers) as response:
            etag = response.headers.get("ETag", "")
            validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
            if response.status == 206:
                self._require_continuation(response.headers.get("Content-Range", ""), validator)
            elif response.status == 200:
                self._restart(info_in(response), validator)
                if self.info.num_bytes is not None:
                    self._check_length(self.info.num_bytes)
            else:
                if response.status == 416:
                    self._restart()
                raise failed_status(response.status)
            async for data in response.content.iter_any():
                self._write(data)

    def _require_continuation(self, content_range: str, validator: str | None) -> None:
        """Start over and raise Failure unless the server sent the next range of the same file."""
        match = CONTENT_RANGE.fullmatch(content_range.strip())
        total = None if match is None or match[2] == "*" else int(match[2])
        is_next = match is not None and int(match[1]) == self.num_bytes
        if not is_next or validator != self.validator or total not in (None, self.info.num_bytes):
            self._restart()
            raise Failure("the file changed during the fetch")

    def _copy_object(self) -> None:
        """Download the missing bytes from an object store, range by range."""
        info = object_info(self.url, stop=self.stop)
        if info.num_bytes is None:
            raise Failure("the store does not report the file's size")
        if info.etag is None or info != self.info:
            self._restart(info)
        self._check_length(info.num_bytes)
        while self.num_bytes < info.num_bytes:
            end = min(self.num_bytes + CHUNK_BYTES, info.num_bytes)
            data = object_range(self.url, self.num_bytes, end, stop=self.stop)
            if len(data) != end - self.num_bytes:
                raise Failure(f"{len(data)} bytes in a range of {end - self.num_bytes}")
            self._write(data)
        # Without a checksum, ranges of two versions of the file could have been joined.
        if info.checksum is None and object_info(self.url, stop=self.stop) != info:
            self._restart()
            raise Failure("the file changed during the fetch")

    def _run_command(self) -> None:
        """Read a command's standard output from the start; no output for the read time-out is a failure."""
        self._restart()
        command = self.url.removeprefix(PIPE)
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            self._read_output(process.stdout.fileno())
            code = process.wait(timeout=web.READ_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise Failure("the command did not exit after its output ended") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if code:
            raise Failure(f"the command exited with {code}", is_final=code in CANNOT_RUN)

    def _read_output(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLHUP)
        last_output = time.monotonic()
        while True:
            if self.stop.is_set():
                raise Abandoned
            if poll.poll(100):
                data = os.read(fd, COMMAND_BYTES)
                if not data:
                    return
                self._write(data)
                last_output = time.monotonic()
            elif time.monotonic() - last_output > web.READ_TIMEOUT_S:
                raise Failure(f"no output from the command for {web.READ_TIMEOUT_S:g} s")

    def _check_length(self, num_bytes: int, *, restarts: bool = True) -> None:
        """Raise Failure unless a length equals that in the server's answer and that in the list of shards."""
        for expected, source in ((self.info.num_bytes, "announced"), (self.shard.num_bytes, "listed")):
            if expected is not None and num_bytes != expected:
                if restarts:
                    self._restart()
                raise Failure(f"{num_bytes} bytes instead of the {expected} {source}")

    def _check_content(self) -> None:
        """Start over and raise Failure unless the bytes match the store's checksum.

        An ETag that looks like an MD5 may be something else: if a second download gives the same bytes, the ETags of
        the shard's folder are no longer used as checksums.
        """
        folder = public_name(self.url).rpartition("/")[0]
        if self.info.checksum is None or (not self.info.is_checksum_sure and folder in self.not_md5):
            return
        algorithm, expected = self.info.checksum
        with io.FileIO(self.fd, closefd=False) as file:
            file.seek(0)
            digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
        if digest == expected:
            return
        if digest == self.last_digest and not self.info.is_checksum_sure:
            self.not_md5.add(folder)
            return
        self.last_digest = digest
        self._restart()
        raise Failure(f"{algorithm} differs from the store's")
