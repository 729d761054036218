"""Read a shard as rows: samples grouped by key, in blocks of encoded images and labels.

Second stage of the flow: the tar's index in, blocks of rows out, in shard order (the order of first members). Every
sample is a row; a bad sample has a reason instead of an image. Images are not decoded here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from vitscore.shards.byte_ranges import ByteArray, read_spans
from vitscore.shards.files import ShardFile, open_local
from vitscore.shards.grouping import IMAGE_EXTENSIONS, NO_MEMBER, group_members, split_name
from vitscore.shards.reasons import (
    EMPTY_IMAGE,
    LABEL_UNREADABLE,
    NO_IMAGE,
    with_details,
)
from vitscore.shards.remote.cache import Cache, is_brought
from vitscore.shards.shard import Shard
from vitscore.shards.tar.index import UNPACKABLE, TarIndex, index_tar


class Labeller(Protocol):
    """The part of a label rule that `OpenShard` uses."""

    @property
    def extension(self) -> str: ...
    def label(self, key: str, raw: bytes | None) -> tuple[int, str | None]: ...


@dataclass
class SampleBlock:
    """Rows of one shard, by column. The images are views of a shared buffer, which lives as long as any of them."""

    keys: list[str]
    images: list[ByteArray | None]
    labels: NDArray[np.int32]
    reasons: list[str | None]

    def __len__(self) -> int:
        return len(self.keys)


class OpenShard:
    """An open shard, read in blocks of rows. Not thread-safe.

    A damaged shard has a `fault`; its readable rows are available nevertheless.

    Args:
        shard: the shard to open.
        image_key: the only extension that counts as an image; None accepts all of `IMAGE_EXTENSIONS`.
        labels: the rule that converts label bytes to ids.
        will_read: whether the rows are read next, so that the operating system may read ahead.
        file: the shard's file if it was fetched or unpacked in advance; closed with the shard.
        cache: the cache for a remote or compressed shard that was not fetched in advance.

    Raises:
        SetupError: the cache's folder is full or cannot be written to.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        image_key: str | None = None,
        labels: Labeller,
        will_read: bool = True,
        file: ShardFile | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.shard = shard
        self.label_rule = labels
        self.image_extensions = (image_key.lstrip(".").lower(),) if image_key else IMAGE_EXTENSIONS
        self._file = file or ((cache or Cache()).bring(shard) if is_brought(shard) else open_local(shard.path))
        self.index = self._index(cache, will_read=will_read)
        self.fault = self.index.fault
        self.num_bytes = self._file.num_bytes
        self._groups = group_members(
            self.index.names, image_extensions=self.image_extensions, label_extension=labels.extension
        )
        self._find_bad_rows()
        self.keys = self._groups.keys
        self.notes = self._write_notes()

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    def _index(self, cache: Cache | None, *, will_read: bool) -> TarIndex:
        file = self._file
        if file.fd < 0:
            return TarIndex(fault=file.fault)
        index = index_tar(file.fd, will_read=will_read)
        if index.compression in UNPACKABLE and not file.is_unpacked:
            # Compressed, but named like a plain tar.
            self._file = file = (cache or Cache()).unpack(file, index.compression)
            index = index_tar(file.fd, will_read=will_read)
        # The file's fault comes first: it is the cause of the missing members.
        index.fault = file.fault or index.fault
        return index

    def _find_bad_rows(self) -> None:
        groups, index = self._groups, self.index
        for row, member in enumerate(groups.image_members):
            if row in groups.reasons:
                continue
            if member == NO_MEMBER:
                got = ", ".join(groups.extensions[row])
                expected = self.image_extensions[0] if len(self.image_extensions) == 1 else ""
                details = f"expected .{expected}, got {got}" if expected else f"got {got}"
                groups.reasons[row] = with_details(NO_IMAGE, details)
            elif member in index.flaws:
                groups.reasons[row] = index.flaws[member]
            elif not index.sizes[member]:
                groups.reasons[row] = EMPTY_IMAGE

    def _write_notes(self) -> list[str]:
        groups = self._groups
        counts = {
            "samples had members that were not adjacent": groups.num_scattered,
            "samples had several images; the first by extension was used": groups.num_many_images,
            "links were skipped": self.index.num_links,
        }
        return [*self._file.notes, *(f"{count} {note}" for note, count in counts.items() if count)]

    def extensions(self, row: int) -> list[str]:
        """Return the extensions of a row's members, in the order of the tar."""
        return self._groups.extensions[row]

    def image_extension(self, row: int) -> str | None:
        """Return the extension of a row's image, or None if the row has no image."""
        member = self._groups.image_members[row]
        key_and_extension = split_name(self.index.names[member]) if member != NO_MEMBER else None
        return key_and_extension[1] if key_and_extension else None

    def read(self, start: int, stop: int) -> SampleBlock:
        """Read rows `start` to `stop`, with one read for adjacent members; a read error becomes the row's reason."""
        groups, rows = self._groups, range(start, min(stop, self.num_samples))
        bad = groups.reasons
        wanted = [member for row in rows if row not in bad for member in (groups.image_members[row],)]
        data = self._read_members(wanted + self._label_members(rows))
        images: list[ByteArray | None] = []
        reasons: list[str | None] = []
        for row in rows:
            reason = bad.get(row)
            image = data[groups.image_members[row]] if reason is None else None
            if isinstance(image, str):
                reason, image = image, None
            images.append(image)
            reasons.append(reason)
        labels = self._label_rows(rows, data, reasons)
        for position, reason in enumerate(reasons):
            if reason is not None:
                images[position] = None
        return SampleBlock(self.keys[rows.start : rows.stop], images, labels, reasons)

    def read_labels(self, start: int, stop: int) -> tuple[NDArray[np.int32], list[str | None]]:
        """Return the labels of rows `start` to `stop`, and the reasons of bad rows, without reading images."""
        rows = range(start, min(stop, self.num_samples))
        reasons = [self._groups.reasons.get(row) for row in rows]
        labels = self._label_rows(rows, self._read_members(self._label_members(rows)), reasons)
        return labels, reasons

    def _label_members(self, rows: range) -> list[int]:
        members = self._groups.label_members[rows.start : rows.stop]
        return [member for member in members if member != NO_MEMBER and member not in self.index.flaws]

    def _label_rows(
        self, rows: range, data: dict[int, ByteArray | str], reasons: list[str | None]
    ) -> NDArray[np.int32]:
        """Return the labels of all rows, and write the reasons of bad labels into `reasons`.

        Rows with bad images have labels too, as they may have to count as wrong answers.
        """
        labels: list[int] = []
        label_of, members, keys = self.label_rule.label, self._groups.label_members, self.keys
        for position, row in enumerate(rows):
            member = members[row]
            raw = data.get(member)
            if isinstance(raw, np.ndarray):
                label, reason = label_of(keys[row], raw.tobytes())
            else:
                label, reason = label_of(keys[row], None)
                if member != NO_MEMBER and label < 0 and reason is None:
                    reason = with_details(LABEL_UNREADABLE, raw or self.index.flaws.get(member, ""))
            labels.append(label)
            if reason is not None and reasons[position] is None:
                reasons[position] = reason
        return np.array(labels, dtype=np.int32)

    def _read_members(self, members: list[int]) -> dict[int, ByteArray | str]:
        """Return the bytes of members, or the reasons why they cannot be read, by position in the index."""
        offsets, sizes = self.index.offsets, self.index.sizes
        arrays = read_spans(self._file.fd, [offsets[m] for m in members], [sizes[m] for m in members])
        return dict(zip(members, arrays, strict=True))

    def close(self) -> None:
        """Close the file; blocks that were read stay valid."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
