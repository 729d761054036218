"""Index the members of a tar by name, offset and size, without reading their data.

First stage of the flow: shard file in, member names, offsets and sizes out. Damaged content raises no exception: the
index holds the members up to the damage and a `fault` for the rest. Does not group members into samples and does not
read them; a compressed tar must be unpacked first.

A fault is a reason of the vocabulary with its details. The rules are:
- A member that extends past the end of the file is listed with a flaw, and the shard has a fault.
- A file that ends at a member's end without the closing zero blocks is whole, as it is for tarfile.
- Data other than zeros after the closing blocks is a fault, since its members are not read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np

from vitscore.shards.reasons import (
    DAMAGED,
    EMPTY_FILE,
    NOT_A_TAR,
    READ_ERROR,
    SPARSE_MEMBER,
    TRUNCATED,
    with_details,
)
from vitscore.shards.tar.header import (
    BLOCK_BYTES,
    DATALESS_TYPES,
    LONG_LINK,
    LONG_NAME,
    PAX_GLOBAL,
    PAX_NEXT_TYPES,
    REGULAR_TYPES,
    SPARSE,
    ZERO_BLOCK,
    BadHeader,
    decode_name,
    first_bad_checksum,
    has_valid_checksum,
    header_name,
    header_size,
    parse_pax_records,
    pax_overrides,
)
from vitscore.shards.tar.plain_headers import plain_headers

# Among small members, one large read covers hundreds of headers. Among large ones, every header takes a small read, so
# that indexing a shard of 110 KB images reads 4% of the file.
WIDE_WINDOW_BYTES = 1 << 20
NARROW_WINDOW_BYTES = 1 << 12
WIDE_UP_TO_SPACING_BYTES = 16 << 10
READAHEAD_BYTES = 8 << 20
"""How far the operating system is asked to read ahead of the index if the data are read next."""
MAX_EXTENDED_HEADER_BYTES = 16 << 20
FEW_HEADERS = 6
"""Below this many headers in a window, checking them one at a time takes less time than numpy's calls."""

COMPRESSED_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
UNPACKABLE = ("gzip", "bzip2", "xz", "zstd")


@dataclass(slots=True)
class Member:
    """A regular file in a tar: its name, and the offset and size of its data."""

    name: str
    offset: int
    size: int


@dataclass
class TarIndex:
    """The regular members of a tar, by column: the n-th name, offset and size belong to the n-th member."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    fault: str | None = None
    flaws: dict[int, str] = field(default_factory=dict)
    """Members that cannot be read: position in the index to reason."""
    num_links: int = 0
    """Number of hard and symbolic links, which hold no data and are skipped, as in webdataset."""
    num_bytes: int = 0
    compression: str | None = None
    """The kind of compression, if the file is compressed."""

    @property
    def members(self) -> list[Member]:
        return [Member(*fields) for fields in zip(self.names, self.offsets, self.sizes, strict=True)]


def index_tar(fd: int, *, will_read: bool = False) -> TarIndex:
    """Index the tar behind an open file.

    Args:
        fd: a seekable file descriptor at any position; it is read with pread and stays open.
        will_read: whether the members' data are read next; the operating system is then asked to read ahead.
    """
    index = TarIndex()
    try:
        index.num_bytes = os.fstat(fd).st_size
        _Walk(fd, index, will_read=will_read).run()
    except OSError as error:
        index.fault = with_details(READ_ERROR, error.strerror or str(error))
    return index


def compression_of(start: bytes) -> str | None:
    """Return a file's kind of compression by its first block, or None.

    A valid tar header gives None, even if the first member's name starts like a compressed file.
    """
    kind = next((name for magic, name in COMPRESSED_MAGIC.items() if start.startswith(magic)), None)
    return None if len(start) == BLOCK_BYTES and has_valid_checksum(start) else kind


class _End(Exception):
    """Raised to end the walk; the message, if any, is the shard's fault."""


class _Walk:
    """One pass over a tar's headers, which adds members to an index."""

    def __init__(self, fd: int, index: TarIndex, *, will_read: bool) -> None:
        self.fd = fd
        self.index = index
        self.position = 0
        self.window = b""
        self.window_start = 0
        self.window_bytes = WIDE_WINDOW_BYTES
        self.advised_up_to = 0 if will_read and hasattr(os, "posix_fadvise") else None
        # Headers in the window whose checksums are not verified yet: their block numbers, and the number of members in
        # the index before every one of them, to remove the members of a wrong header.
        self.unverified: list[int] = []
        self.num_members_before: list[int] = []
        self.pending: dict[str, str] = {}
        self.global_pax: dict[str, str] = {}

    def run(self) -> None:
        try:
            self.check_start()
            while True:
                self.load_window()
                self.walk_window()
        except _End as end:
            fault = str(end)
        except BadHeader as bad:
            fault = with_details(DAMAGED, f"header at byte {self.position}: {bad}")
        # Headers before the end may be wrong, too: a bad header leads the walk to a wrong position.
        try:
            self.verify()
        except _End as end:
            fault = str(end)
        self.index.fault = fault or None

    def check_start(self) -> None:
        size = self.index.num_bytes
        if size == 0:
            raise _End(EMPTY_FILE)
        start = os.pread(self.fd, BLOCK_BYTES, 0)
        self.index.compression = compression_of(start)
        if self.index.compression is not None:
            raise _End(with_details(NOT_A_TAR, f"{self.index.compression} data; unpack it first"))
        if len(start) < BLOCK_BYTES:
            raise _End(with_details(NOT_A_TAR, f"only {size} bytes"))
        if start != ZERO_BLOCK and not has_valid_checksum(start):
            raise _End(with_details(NOT_A_TAR, "no tar header at its start"))

    def load_window(self) -> None:
        """Read the next window; its size depends on the spacing of the headers in the last one."""
        if self.unverified:
            spacing = (self.position - self.window_start) / len(self.unverified)
            is_wide = spacing <= WIDE_UP_TO_SPACING_BYTES
            self.window_bytes = WIDE_WINDOW_BYTES if is_wide else NARROW_WINDOW_BYTES
        self.verify()
        self.advise()
        self.window_start = self.position
        self.window = os.pread(self.fd, self.window_bytes, self.position)
        if not self.window:
            raise _End  # at a member's end: the tar is whole, though without the closing blocks
        if len(self.window) < BLOCK_BYTES:
            is_padding = not any(self.window)
            raise _End("" if is_padding else with_details(TRUNCATED, f"in the header at byte {self.position}"))

    def advise(self) -> None:
        if self.advised_up_to is not None and self.position + READAHEAD_BYTES // 2 >= self.advised_up_to:
            start = max(self.advised_up_to, self.position)
            os.posix_fadvise(self.fd, start, READAHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            self.advised_up_to = start + READAHEAD_BYTES

    def walk_window(self) -> None:
        """Index the window's headers: a run of plain ones at once, and the others one by one.

        Parsing plain headers is written out in the loop for speed.
        """
        if self.window_bytes == WIDE_WINDOW_BYTES and not self.pending and not self.global_pax:
            self.take_run()
        window, window_start, file_bytes = self.window, self.window_start, self.index.num_bytes
        names, offsets, sizes = self.index.names, self.index.offsets, self.index.sizes
        last = len(window) - BLOCK_BYTES
        at = self.position - window_start
        while at <= last:
            name_end = window.find(0, at, at + 100)
            kind = window[at + 156]
            is_plain = kind in REGULAR_TYPES and name_end > at and not window[at + 345] and not self.pending
            if not is_plain or self.global_pax or window[at + 135] not in b"\0 " or window[name_end - 1] == 47:
                at = self.take_special(at)
                continue
            try:
                size = int(window[at + 124 : at + 135], 8)
            except ValueError:
                at = self.take_special(at)
                continue
            data = window_start + at + BLOCK_BYTES
            end = data + ((size + 511) & -512)
            if end > file_bytes or size < 0:
                at = self.take_special(at)
                continue
            self.unverified.append(at >> 9)
            self.num_members_before.append(len(names))
            try:
                names.append(window[at:name_end].decode())
            except UnicodeDecodeError:
                names.append(decode_name(window[at:name_end]))
            offsets.append(data)
            sizes.append(size)
            at = end - window_start
            self.position = end

    def take_run(self) -> None:
        """Index the run of plain headers at the window's start, which among small members is usually all of them."""
        index = self.index
        headers = plain_headers(self.window, self.window_start, num_bytes=index.num_bytes)
        if headers is None:
            return
        self.unverified += headers.blocks
        self.num_members_before += range(len(index.names), len(index.names) + len(headers.names))
        index.names += headers.names
        index.offsets += headers.offsets
        index.sizes += headers.sizes
        self.position = headers.next_position

    def take_special(self, at: int) -> int:
        """Verify and index a header that is not plain; return the position of the next one in the window."""
        self.position = position = self.window_start + at
        block = self.window[at : at + BLOCK_BYTES]
        if block == ZERO_BLOCK:
            self.check_tail(position)
        if not has_valid_checksum(block):
            raise BadHeader("wrong checksum")
        kind, size = block[156], header_size(block)
        if kind in (LONG_NAME, LONG_LINK, PAX_GLOBAL) or kind in PAX_NEXT_TYPES:
            self.take_extended(kind, self.read_extended(size))
            self.position = _padded(position + BLOCK_BYTES + size)
        else:
            self.take_member(block, kind, size)
        # Added for the spacing of the headers, which decides the next window's size; verifying it twice is harmless.
        self.unverified.append(at >> 9)
        self.num_members_before.append(len(self.index.names))
        return self.position - self.window_start

    def read_extended(self, size: int) -> bytes:
        """Return the body of an extended header, which often extends past the window."""
        if size > MAX_EXTENDED_HEADER_BYTES:
            raise BadHeader(f"an extended header of {size} bytes")
        body = os.pread(self.fd, size, self.position + BLOCK_BYTES)
        if len(body) < size:
            raise _End(with_details(TRUNCATED, f"in the extended header at byte {self.position}"))
        return body

    def take_extended(self, kind: int, body: bytes) -> None:
        if kind == LONG_NAME:
            self.pending.setdefault("path", decode_name(body))
        elif kind == PAX_GLOBAL:
            self.global_pax.update(pax_overrides(parse_pax_records(body)))
        elif kind in PAX_NEXT_TYPES:
            # Of several headers before one member, the first takes precedence, as in tarfile.
            self.pending = pax_overrides(parse_pax_records(body)) | self.pending

    def take_member(self, block: bytes, kind: int, size: int) -> None:
        """Index the member if it is a regular file, and move past its data."""
        overrides = self.global_pax | self.pending
        self.pending = {}
        name = overrides.get("path") or header_name(block)
        size = int(overrides.get("size", size))
        data = self.position + BLOCK_BYTES
        is_folder = kind == 0 and name.endswith("/")
        if kind in DATALESS_TYPES or is_folder:
            self.index.num_links += kind in b"12"
            self.position = data
            return
        is_sparse = kind == SPARSE or "sparse" in overrides
        data = self.skip_sparse_map(block, data) if kind == SPARSE else data
        if kind in REGULAR_TYPES or is_sparse:
            self.append(name, data, size, is_sparse=is_sparse)
        if data + size > self.index.num_bytes:
            raise _End(with_details(TRUNCATED, f"{name!r} ends at byte {data + size} of {self.index.num_bytes}"))
        self.position = _padded(data + size)
        if self.position > self.index.num_bytes:
            raise _End(with_details(TRUNCATED, f"in the padding behind {name!r}"))

    def append(self, name: str, data: int, size: int, *, is_sparse: bool) -> None:
        if data + size > self.index.num_bytes:
            missing = data + size - self.index.num_bytes
            self.index.flaws[len(self.index.names)] = with_details(TRUNCATED, f"its last {missing} bytes are missing")
        elif is_sparse:
            self.index.flaws[len(self.index.names)] = SPARSE_MEMBER
        self.index.names.append(name)
        self.index.offsets.append(data)
        self.index.sizes.append(size)

    def skip_sparse_map(self, block: bytes, data: int) -> int:
        """Return the offset of the data of an old GNU sparse file, whose map may continue in blocks before it."""
        is_continued = bool(block[482])
        while is_continued:
            block = os.pread(self.fd, BLOCK_BYTES, data)
            if len(block) < BLOCK_BYTES:
                raise _End(with_details(TRUNCATED, f"in the sparse map at byte {data}"))
            is_continued = bool(block[504])
            data += BLOCK_BYTES
        return data

    def check_tail(self, position: int) -> None:
        """End the walk at the first zero block, with a fault if anything but zeros follows."""
        while tail := os.pread(self.fd, WIDE_WINDOW_BYTES, position):
            if any(tail) if len(tail) < BLOCK_BYTES else np.frombuffer(tail, np.uint8).any():
                raise _End(with_details(DAMAGED, f"data behind the end of the archive at byte {self.position}"))
            position += len(tail)
        raise _End

    def verify(self) -> None:
        """Verify the unverified headers; a wrong one removes its member and all later ones from the index."""
        if not self.unverified:
            return
        bad = self.first_bad_of_few() if len(self.unverified) < FEW_HEADERS else self.first_bad_of_many()
        if bad is not None:
            self.take_back(bad)
        self.unverified.clear()
        self.num_members_before.clear()

    def first_bad_of_few(self) -> int | None:
        for index, block in enumerate(self.unverified):
            if not has_valid_checksum(self.window[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]):
                return index
        return None

    def first_bad_of_many(self) -> int | None:
        blocks_N512 = np.frombuffer(self.window, np.uint8, len(self.window) & -BLOCK_BYTES).reshape(-1, BLOCK_BYTES)
        return first_bad_checksum(blocks_N512[self.unverified])

    def take_back(self, bad: int) -> None:
        position = self.window_start + self.unverified[bad] * BLOCK_BYTES
        num_members = self.num_members_before[bad]
        self.unverified.clear()
        self.num_members_before.clear()
        for column in (self.index.names, self.index.offsets, self.index.sizes):
            del column[num_members:]
        self.index.flaws = {member: flaw for member, flaw in self.index.flaws.items() if member < num_members}
        raise _End(with_details(DAMAGED, f"header at byte {position}: wrong checksum"))


def _padded(position: int) -> int:
    """Round a position up to a multiple of the block size."""
    return (position + BLOCK_BYTES - 1) & -BLOCK_BYTES
