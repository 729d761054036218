"""Parse the run of plain headers at the start of a window all at once.

Used by the tar index if members are small: a few numpy calls for a window of a thousand headers take a sixth of the
time of walking from header to header. The result equals that of the walk up to the first header that is not plain,
where the walk continues. Checksums are not verified here.

Axes: N headers of 512 bytes, of which the first 100 are the name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitscore.shards.tar.header import BLOCK_BYTES, REGULAR_TYPES

_MAGIC = np.frombuffer(b"ustar", np.uint8)
_REGULAR = np.isin(np.arange(256), list(REGULAR_TYPES))
_OCTAL_WEIGHTS_11 = 8 ** np.arange(10, -1, -1, dtype=np.int64)


@dataclass(frozen=True)
class PlainHeaders:
    """A run of plain headers: their members by column, and their block numbers in the window."""

    blocks: list[int]
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    next_position: int
    """Offset of the header after the last one, in the file."""


def plain_headers(window: bytes, start: int, *, num_bytes: int) -> PlainHeaders | None:
    """Return the run of plain headers at the start of a window, or None if its first header is not plain.

    Args:
        window: bytes of the file that start where a header is expected.
        start: the window's offset in the file.
        num_bytes: the file's size.
    """
    blocks_N512 = np.frombuffer(window, np.uint8, len(window) & -BLOCK_BYTES).reshape(-1, BLOCK_BYTES)
    # Data may look like a header: a block counts as one only if the header before it leads there.
    places_N = np.flatnonzero(blocks_N512[:, 257] == _MAGIC[0])
    headers_N512 = blocks_N512[places_N]
    digits_N11 = headers_N512[:, 124:135] - np.uint8(ord("0"))  # wraps round below zero
    sizes_N = digits_N11 @ _OCTAL_WEIGHTS_11
    next_N = places_N + 1 + ((sizes_N + BLOCK_BYTES - 1) // BLOCK_BYTES)
    is_named_N = _has_plain_name(headers_N512[:, :100])
    is_plain_N = (
        is_named_N
        & (headers_N512[:, 257:262] == _MAGIC).all(axis=1)
        & (digits_N11 < 8).all(axis=1)
        & ((headers_N512[:, 135] == 0) | (headers_N512[:, 135] == ord(" ")))
        & _REGULAR[headers_N512[:, 156]]
        & (headers_N512[:, 345] == 0)
        & (start + next_N * BLOCK_BYTES <= num_bytes)
        & (places_N == np.concatenate([[0], next_N[:-1]]))
    )
    count = len(is_plain_N) if is_plain_N.all() else int(is_plain_N.argmin())
    if not count:
        return None
    names = _decoded(headers_N512[:count, :100])
    if names is None:
        return None
    return PlainHeaders(
        blocks=places_N[:count].tolist(),
        names=names,
        offsets=(start + BLOCK_BYTES + places_N[:count] * BLOCK_BYTES).tolist(),
        sizes=sizes_N[:count].tolist(),
        next_position=start + int(next_N[count - 1]) * BLOCK_BYTES,
    )


def _has_plain_name(fields_N100: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which names are plain: followed by NULs only, and not the name of a folder."""
    is_text = fields_N100 != 0
    lengths_N = is_text.sum(axis=1)
    # argmin gives the first NUL, or 0 if there is none.
    is_ended_N = (is_text.argmin(axis=1) == lengths_N) & (lengths_N > 0)
    last_N = fields_N100[np.arange(len(fields_N100)), lengths_N - 1]
    is_file_N: NDArray[np.bool_] = is_ended_N & (last_N != ord("/"))
    return is_file_N


def _decoded(fields_N100: NDArray[np.uint8]) -> list[str] | None:
    """Return the names as text, or None if one of them is not UTF-8."""
    raw = np.ascontiguousarray(fields_N100).view("S100").ravel().tolist()
    try:
        return b"\0".join(raw).decode().split("\0")
    except UnicodeDecodeError:
        return None
