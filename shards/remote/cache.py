"""Fetch and unpack remote or compressed shards, a bounded number ahead of the reader.

Sits between the list of shards and the reader. Local tars pass through unchanged and are not opened in advance. A
shard's file is open from the start of its fetch until the reader closes it, and at most `size` files are open at a time
(a shard has two while it is being unpacked).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from vitscore.shards.files import ShardFile, open_local
from vitscore.shards.naming import SHARD_SUFFIXES
from vitscore.shards.redaction import is_remote
from vitscore.shards.shard import Shard
from vitscore.shards.tar.header import BLOCK_BYTES
from vitscore.shards.tar.index import UNPACKABLE, compression_of

DEFAULT_SIZE = 3
COMPRESSED_SUFFIXES = tuple(suffix for suffix in SHARD_SUFFIXES if suffix != ".tar")

T = TypeVar("T")


def is_brought(shard: Shard) -> bool:
    """Whether a shard's name says that it must be fetched or unpacked before it is read."""
    return is_remote(shard.path) or shard.path.lower().endswith(COMPRESSED_SUFFIXES)


class Cache:
    """A folder for the fetched and unpacked shards of one reader.

    Args:
        folder: None uses the system's folder for temporary files (`TMPDIR`).
        size: maximum number of shards in the folder.
    """

    def __init__(self, folder: Path | None = None, *, size: int = DEFAULT_SIZE) -> None:
        self.folder = folder or Path(tempfile.gettempdir())
        self.size = size
        self._stop = threading.Event()
        self._not_md5: set[str] = set()

    def bring(self, shard: Shard) -> ShardFile:
        """Open a shard's tar, fetched and unpacked as needed.

        Raises:
            SetupError: the folder is full or cannot be written to.
            Abandoned: the cache was stopped.
        """
        if is_remote(shard.path):
            from vitscore.shards.remote.fetch import fetch

            file = fetch(shard, folder=self.folder, stop=self._stop, not_md5=self._not_md5)
        else:
            file = open_local(shard.path)
        try:
            kind = compression_of(os.pread(file.fd, BLOCK_BYTES, 0)) if file.fd >= 0 else None
        except OSError:
            kind = None  # indexing the file reports the error
        return self.unpack(file, kind) if kind in UNPACKABLE else file

    def unpack(self, file: ShardFile, kind: str) -> ShardFile:
        """Replace a compressed file by the tar in it.

        Raises:
            SetupError: the folder is full or cannot be written to.
            Abandoned: the cache was stopped.
        """
        from vitscore.shards.remote.unpack import unpack

        return unpack(file, kind, folder=self.folder, stop=self._stop)

    def stop(self) -> None:
        """Abort all fetching and unpacking; may be called from any thread."""
        self._stop.set()


def fetch_ahead(
    items: Iterable[tuple[T, Shard]], cache: Cache, *, may_draw: Callable[[], bool] = lambda: True
) -> Generator[tuple[T, Shard, ShardFile | None], None, None]:
    """Yield items in order with their shards and files, and fetch the next shards in the meantime.

    The file of a local tar is None: it needs no fetch. The caller closes a file before it requests the next item. Items
    after a local tar are drawn only when they are requested.

    Args:
        items: pairs of any value and a shard.
        cache: the cache for the files; it is stopped if the iteration ends early.
        may_draw: whether an item may be drawn before it is requested.

    Raises:
        SetupError: the cache's folder is full or cannot be written to.
        Abandoned: the cache was stopped.
    """
    source = iter(items)
    ahead: deque[tuple[T, Shard, Future[ShardFile] | None]] = deque()
    pool: ThreadPoolExecutor | None = None
    try:
        while True:
            while not ahead or (ahead[-1][2] is not None and len(ahead) < cache.size and may_draw()):
                item = next(source, None)
                if item is None:
                    break
                pool = pool or (ThreadPoolExecutor(cache.size, "fetch") if is_brought(item[1]) else None)
                brought = pool.submit(cache.bring, item[1]) if pool and is_brought(item[1]) else None
                ahead.append((*item, brought))
            if not ahead:
                return
            label, shard, future = ahead[0]
            file = future.result() if future is not None else None
            ahead.popleft()
            yield label, shard, file
    finally:
        if ahead:
            cache.stop()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        for _, _, future in ahead:
            if future is not None and not future.cancelled():
                with contextlib.suppress(BaseException):
                    future.result().close()
