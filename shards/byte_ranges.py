"""Read byte ranges of a file with few system calls.

Used by `samples`: ranges in, views out. Neighbouring ranges are read by one pread into one buffer, so a block of small
samples costs one system call instead of one per sample. A failed read yields a reason for the ranges it covers; all
other ranges are unaffected.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitscore.shards.reasons import READ_ERROR, TRUNCATED, with_details

ByteArray = NDArray[np.uint8]

MAX_GAP_BYTES = 32 << 10
"""Largest gap that is read over: up to this size, reading it costs less than another call."""


def read_spans(fd: int, offsets: Sequence[int], sizes: Sequence[int]) -> list[ByteArray | str]:
    """Read ranges of a file.

    Args:
        fd: the open file; its position is not used.
        offsets: the first byte of each range, in any order.
        sizes: the length of each range.

    Returns:
        For each range a view over a buffer that it shares with its neighbours, or the reason why it cannot be read.
    """
    if not offsets:
        return []
    starts = np.array(offsets, dtype=np.int64)
    ends = starts + np.array(sizes, dtype=np.int64)
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    reach = np.maximum.accumulate(ends)
    cuts = np.flatnonzero(starts[1:] - reach[:-1] > MAX_GAP_BYTES) + 1
    firsts = [0, *cuts.tolist()]
    lasts = [*cuts.tolist(), len(order)]
    results: list[ByteArray | str] = [""] * len(order)
    positions = order.tolist()
    for first, last in zip(firsts, lasts, strict=True):
        base = int(starts[first])
        buffer = _read(fd, base, int(reach[last - 1]) - base)
        lows, highs = (starts[first:last] - base).tolist(), (ends[first:last] - base).tolist()
        if buffer is not None and len(buffer) == reach[last - 1] - base:
            for position, low, high in zip(positions[first:last], lows, highs, strict=True):
                results[position] = buffer[low:high]
            continue
        for position, low, high in zip(positions[first:last], lows, highs, strict=True):
            view = buffer[low:high] if buffer is not None else None
            is_whole = view is not None and len(view) == high - low
            results[position] = view if view is not None and is_whole else _read_one(fd, base + low, high - low)
    return results


def _read(fd: int, offset: int, size: int) -> ByteArray | None:
    """Read up to `size` bytes: fewer at the end of the file, None if the read fails."""
    buffer = np.empty(size, dtype=np.uint8)
    view = buffer.data
    num_read = 0
    try:
        while num_read < size:
            num_new = os.preadv(fd, [view[num_read:]], offset + num_read)
            if num_new == 0:
                return buffer[:num_read]
            num_read += num_new
    except OSError:
        return None
    return buffer


def _read_one(fd: int, offset: int, size: int) -> ByteArray | str:
    """Read a single range, after the read that it shared with its neighbours failed."""
    try:
        data = os.pread(fd, size, offset)
    except OSError as error:
        return with_details(READ_ERROR, error.strerror or str(error))
    if len(data) < size:
        return with_details(TRUNCATED, f"its last {size - len(data)} bytes are missing")
    return np.frombuffer(data, dtype=np.uint8)
