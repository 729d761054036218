"""Shards that must be brought here before they can be read: fetched, unpacked, a bounded number ahead of the reader.

Between the list of shards and the reader. Local tars pass through untouched and are never looked ahead for. A shard's
file is open from the start of its fetch until the reader closes it, and at most `size` are open at one time (a shard
that is being unpacked has two for that while).
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
    """Whether a shard is fetched or unpacked before it is read, as far as its name tells."""
    return is_remote(shard.path) or shard.path.lower().endswith(COMPRESSED_SUFFIXES)


class Cache:
    """A folder for shards on their way to one reader.

    Args:
        folder: None is the system's for temporary files (`TMPDIR`).
        size: how many shards may be in it.
    """

    def __init__(self, folder: Path | None = None, *, size: int = DEFAULT_SIZE) -> None:
        self.folder = folder or Path(tempfile.gettempdir())
        self.size = size
        self._stop = threading.Event()
        self._not_md5: set[str] = set()

    def bring(self, shard: Shard) -> ShardFile:
        """A shard's tar as an open file.

        Raises:
            SetupError: the folder is full, or cannot be written.
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
            kind = None  # whoever reads it next will say so
        return self.unpack(file, kind) if kind in UNPACKABLE else file

    def unpack(self, file: ShardFile, kind: str) -> ShardFile:
        """The tar in a compressed one's place.

        Raises:
            SetupError: the folder is full, or cannot be written.
            Abandoned: the cache was stopped.
        """
        from vitscore.shards.remote.unpack import unpack

        return unpack(file, kind, folder=self.folder, stop=self._stop)

    def stop(self) -> None:
        """End whatever is on its way, from any thread."""
        self._stop.set()


def fetch_ahead(
    items: Iterable[tuple[T, Shard]], cache: Cache, *, may_draw: Callable[[], bool] = lambda: True
) -> Generator[tuple[T, Shard, ShardFile | None], None, None]:
    """Pass shards on in order, with their files where they had to be brought; None stands for a local tar.

    The next item is asked for once the last one's file is closed; a local tar, only when it is wanted.

    Args:
        items: something of the caller's, and the shard.
        cache: where the files go; it is stopped when the iteration ends early.
        may_draw: whether an item may be taken before it is wanted.

    Raises:
        SetupError: the cache's folder is full, or cannot be written.
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
