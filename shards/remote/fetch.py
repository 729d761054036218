"""The fetch of one remote shard: a URL or a command in, a file in the cache folder out.

Between stores and index. A failed try leaves what it brought, and the next one goes on behind it where the server
proves that the file is still the same; else it starts anew. What comes is checked for its length, and against the
store's checksum where there is one. What cannot be had is a fault of the shard, not an exception.
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
from vitscore.shards.remote.web import CONTENT_RANGE, Found, found_in, run_async, web_filesystem
from vitscore.shards.shard import Shard

CHUNK_BYTES = 8 << 20
"""A range of an object store."""
COMMAND_BYTES = 1 << 20
CANNOT_RUN = (126, 127)
"""A shell's exit codes for a command that is not there or may not be run."""


def fetch(shard: Shard, *, folder: Path, stop: threading.Event, not_md5: set[str]) -> ShardFile:
    """Fetch a shard, with as many tries as it takes or `failures.TRIES`.

    Args:
        shard: a remote one.
        folder: where the file goes; it has no name there.
        stop: ends the fetch.
        not_md5: places whose ETags only look like MD5; added to.

    Raises:
        SetupError: the folder is full.
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
    """One shard on its way into a file."""

    def __init__(self, shard: Shard, fd: int, folder: Path, stop: threading.Event, not_md5: set[str]) -> None:
        self.shard = shard
        self.url = shard.path
        self.fd = fd
        self.folder = folder
        self.stop = stop
        self.not_md5 = not_md5
        self.num_bytes = 0
        self.found = Found()
        """What the store said of the file that the bytes so far are of."""
        self.validator: str | None = None
        """What a server must repeat for its next bytes to be of the same file."""
        self.last_digest = ""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Drop the file. An abandoned request may still be at work in its thread, and must not write into another."""
        with self._lock:
            os.close(self.fd)
            self.fd = -1

    @property
    def notes(self) -> tuple[str, ...]:
        listed, etag = self.shard.etag, self.found.etag
        return ("it changed after it was listed",) if listed and etag and listed != etag else ()

    def run_once(self) -> None:
        """One try.

        Raises:
            Failure: another try may do better.
        """
        if self.url.startswith(PIPE):
            self._run_command()
        elif is_web(self.url):
            run_async(self.url, self._get(), loop=web_filesystem().loop, stop=self.stop)
        else:
            self._copy_object()
        self._check_length(self.num_bytes, restarts=self.num_bytes > (self.found.num_bytes or 0))
        self._check_content()

    def _restart(self, found: Found | None = None, validator: str | None = None) -> None:
        with self._lock:
            if self.fd < 0:
                raise Abandoned
            os.ftruncate(self.fd, 0)
        self.num_bytes = 0
        self.found, self.validator = found or Found(), validator

    def _write(self, data: bytes) -> None:
        with self._lock:
            if self.fd < 0:
                raise Abandoned
            self.num_bytes = write_at(self.fd, data, self.num_bytes, folder=self.folder)

    async def _get(self) -> None:
        """What is missing, by http: a range where there is something to go on from."""
        headers = {}
        if self.num_bytes and self.validator:
            headers = {"Range": f"bytes={self.num_bytes}-", "If-Range": self.validator}
        async with await web.request("GET", self.url, headers) as response:
            etag = response.headers.get("ETag", "")
            validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
            if response.status == 206:
                self._require_continuation(response.headers.get("Content-Range", ""), validator)
            elif response.status == 200:
                self._restart(found_in(response), validator)
                if self.found.num_bytes is not None:
                    self._check_length(self.found.num_bytes)
            else:
                if response.status == 416:
                    self._restart()
                raise failed_status(response.status)
            async for data in response.content.iter_any():
                self._write(data)

    def _require_continuation(self, content_range: str, validator: str | None) -> None:
        """Raise Failure, and begin anew, unless a range is the next one of the same file."""
        match = CONTENT_RANGE.fullmatch(content_range.strip())
        total = None if match is None or match[2] == "*" else int(match[2])
        is_next = match is not None and int(match[1]) == self.num_bytes
        if not is_next or validator != self.validator or total not in (None, self.found.num_bytes):
            self._restart()
            raise Failure("changed while it was fetched")

    def _copy_object(self) -> None:
        """What is missing, from an object store, range by range."""
        found = object_info(self.url, stop=self.stop)
        if found.num_bytes is None:
            raise Failure("the store does not tell its size")
        if found.etag is None or found != self.found:
            self._restart(found)
        self._check_length(found.num_bytes)
        while self.num_bytes < found.num_bytes:
            end = min(self.num_bytes + CHUNK_BYTES, found.num_bytes)
            data = object_range(self.url, self.num_bytes, end, stop=self.stop)
            if len(data) != end - self.num_bytes:
                raise Failure(f"{len(data)} bytes came instead of {end - self.num_bytes}")
            self._write(data)
        # Ranges of two versions may have been put together; a checksum would tell.
        if found.checksum is None and object_info(self.url, stop=self.stop) != found:
            self._restart()
            raise Failure("changed while it was fetched")

    def _run_command(self) -> None:
        """All of it, from a command's standard output; silence for as long as a read may take is a failure."""
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
            raise Failure("the command does not end") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if code:
            raise Failure(f"the command ended with {code}", is_final=code in CANNOT_RUN)

    def _read_output(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLHUP)
        heard = time.monotonic()
        while True:
            if self.stop.is_set():
                raise Abandoned
            if poll.poll(100):
                data = os.read(fd, COMMAND_BYTES)
                if not data:
                    return
                self._write(data)
                heard = time.monotonic()
            elif time.monotonic() - heard > web.READ_TIMEOUT_S:
                raise Failure(f"the command is silent for {web.READ_TIMEOUT_S:g} s")

    def _check_length(self, num_bytes: int, *, restarts: bool = True) -> None:
        """Raise Failure unless this is the length that the answer told, and the one that was listed."""
        for wanted, who in ((self.found.num_bytes, "told"), (self.shard.num_bytes, "listed")):
            if wanted is not None and num_bytes != wanted:
                if restarts:
                    self._restart()
                raise Failure(f"{num_bytes} bytes instead of the {wanted} that were {who}")

    def _check_content(self) -> None:
        """Raise Failure, and begin anew, where the bytes do not have the store's checksum.

        A digest that an ETag only looks like is given up when a second fetch brings the same bytes.
        """
        place = public_name(self.url).rpartition("/")[0]
        if self.found.checksum is None or (not self.found.is_checksum_sure and place in self.not_md5):
            return
        algorithm, wanted = self.found.checksum
        with io.FileIO(self.fd, closefd=False) as file:
            file.seek(0)
            digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
        if digest == wanted:
            return
        if digest == self.last_digest and not self.found.is_checksum_sure:
            self.not_md5.add(place)
            return
        self.last_digest = digest
        self._restart()
        raise Failure(f"its {algorithm} is not the store's")
