"""Unpack compressed tars: gzip, bzip2, xz or zstd in, the tar in a file of the cache folder out.

Sits between file and index: the index reads at any offset, so it needs the tar itself. The data are streamed with a
fixed amount of memory. Damage raises no exception: the bytes before it are kept, and the fault says where they end.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitscore.shards.files import ShardFile, new_file, write_at
from vitscore.shards.reasons import DAMAGED, READ_ERROR, TRUNCATED, with_details
from vitscore.shards.remote.retries import Abandoned

PIECE_BYTES = 128 << 10
"""Bytes unpacked at a time; damage can lose the bytes before it in the same piece."""
ZSTD_STEP_BYTES = 4 << 10
"""Bytes per read of zstd data: small, as pyarrow discards the bytes of a failed read; 256 reads take 0.4 ms."""


def unpack(file: ShardFile, kind: str, *, folder: Path, stop: threading.Event) -> ShardFile:
    """Unpack a shard's file into a new one, and close the compressed file.

    Args:
        file: the compressed tar.
        kind: `gzip`, `bzip2`, `xz` or `zstd`.
        folder: the folder of the new, unnamed file.
        stop: aborts the unpacking when set.

    Raises:
        SetupError: the folder is full or cannot be written to.
        Abandoned: `stop` was set.
    """
    target = new_file(folder)
    try:
        fault = _copy(file.fd, target, kind, folder, stop)
    except BaseException:
        os.close(target)
        raise
    finally:
        file.close()
    return ShardFile(target, file.num_bytes, fault or file.fault, file.notes, is_unpacked=True)


def _copy(fd: int, target: int, kind: str, folder: Path, stop: threading.Event) -> str | None:
    """Unpack from one descriptor into another, and return the fault, if any."""
    os.lseek(fd, 0, os.SEEK_SET)
    num_bytes = 0
    raw = io.FileIO(fd, closefd=False)
    try:
        read = OPENERS[kind](raw)
        # One read of the decompressor at a time: a failed longer read would lose the bytes that it had.
        while piece := read(PIECE_BYTES):
            num_bytes = write_at(target, piece, num_bytes, folder=folder)
            if stop.is_set():
                raise Abandoned
    except EOFError:
        return with_details(TRUNCATED, f"{kind} data end after {num_bytes} unpacked bytes")
    except (zlib.error, lzma.LZMAError) as error:
        return with_details(DAMAGED, f"{kind} data after {num_bytes} unpacked bytes: {error}")
    except OSError as error:
        if error.errno is not None:
            return with_details(READ_ERROR, error.strerror or str(error))
        if "truncated" in str(error).lower():
            return with_details(TRUNCATED, f"{kind} data end after {num_bytes} unpacked bytes")
        return with_details(DAMAGED, f"{kind} data after {num_bytes} unpacked bytes: {error}")
    return None


def _open_zstd(raw: io.FileIO) -> Callable[[int], bytes]:
    # Python has no zstd before 3.14; pyarrow is installed for the parts.
    import pyarrow as pa

    stream: Any = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    failure: list[Exception] = []

    def read(num_bytes: int) -> bytes:
        steps = []
        try:
            if failure:
                raise failure.pop()
            for _ in range(0, num_bytes, ZSTD_STEP_BYTES):
                steps.append(stream.read(ZSTD_STEP_BYTES))
                if not steps[-1]:
                    break
        except OSError as error:
            if not steps:
                raise
            failure.append(error)
        return b"".join(steps)

    return read


OPENERS: dict[str, Callable[[io.FileIO], Callable[[int], bytes]]] = {
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb").read1,
    "bzip2": lambda raw: bz2.BZ2File(raw).read1,
    "xz": lambda raw: lzma.LZMAFile(raw).read1,
    "zstd": _open_zstd,
}
