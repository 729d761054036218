"""A shard as rows: samples grouped by key, read in blocks of encoded images and labels.

Second stage of the flow: the tar's index in, blocks of rows out, in shard order (the order of first members). Every
sample is a row, whatever is wrong with it: its reason stands where its image would be. It decodes nothing.
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
    """What a shard needs of a label rule."""

    @property
    def extension(self) -> str: ...
    def label(self, key: str, raw: bytes | None) -> tuple[int, str | None]: ...


@dataclass
class SampleBlock:
    """Rows of one shard. The images are views that stay valid as long as any of them is referenced."""

    keys: list[str]
    images: list[ByteArray | None]
    labels: NDArray[np.int32]
    reasons: list[str | None]

    def __len__(self) -> int:
        return len(self.keys)


class OpenShard:
    """An open shard: its rows by number, read in blocks. Not thread-safe.

    What is wrong with the shard is its `fault`; the rows that could be found are there all the same.

    Args:
        shard: where it is.
        image_key: the only extension that is an image; None takes all of `IMAGE_EXTENSIONS`.
        labels: how label bytes become ids.
        will_read: the rows are read next, so the kernel may fetch the file ahead.
        file: the shard's file where it was brought here ahead; closed with the shard.
        cache: where it is brought to else, if it is remote or compressed.

    Raises:
        SetupError: the cache's folder is full, or cannot be written.
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
            # Compressed under the name of a plain tar.
            self._file = file = (cache or Cache()).unpack(file, index.compression)
            index = index_tar(file.fd, will_read=will_read)
        # What the tar lacks began where its bytes ended.
        index.fault = file.fault or index.fault
        return index

    def _find_bad_rows(self) -> None:
        groups, index = self._groups, self.index
        for row, member in enumerate(groups.image_members):
            if row in groups.reasons:
                continue
            if member == NO_MEMBER:
                found = ", ".join(groups.extensions[row])
                expected = self.image_extensions[0] if len(self.image_extensions) == 1 else ""
                details = f"expected .{expected}, got {found}" if expected else f"got {found}"
                groups.reasons[row] = with_details(NO_IMAGE, details)
            elif member in index.flaws:
                groups.reasons[row] = index.flaws[member]
            elif not index.sizes[member]:
                groups.reasons[row] = EMPTY_IMAGE

    def _write_notes(self) -> list[str]:
        groups = self._groups
        counts = {
            "samples had members that were not adjacent": groups.num_scattered,
            "samples had several images; the first by extension was taken": groups.num_many_images,
            "links were skipped": self.index.num_links,
        }
        return [*self._file.notes, *(f"{count} {what}" for what, count in counts.items() if count)]

    def extensions(self, row: int) -> list[str]:
        """The extensions of a row's members, in the tar's order."""
        return self._groups.extensions[row]

    def image_extension(self, row: int) -> str | None:
        """The extension of the member that is a row's image."""
        member = self._groups.image_members[row]
        key_and_extension = split_name(self.index.names[member]) if member != NO_MEMBER else None
        return key_and_extension[1] if key_and_extension else None

    def read(self, start: int, stop: int) -> SampleBlock:
        """Read rows `start` to `stop`: one read where their members lie together. Any read error is a row's reason."""
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
        """The labels of rows `start` to `stop`, and the reasons of those that are bad; no image is read."""
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
        """Labels of rows, bad ones too: a bad image may have to count as a wrong answer. Reasons are filled in."""
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
        """The bytes of members by number, or why they cannot be read."""
        offsets, sizes = self.index.offsets, self.index.sizes
        arrays = read_spans(self._file.fd, [offsets[m] for m in members], [sizes[m] for m in members])
        return dict(zip(members, arrays, strict=True))

    def close(self) -> None:
        """Close the file. Blocks that were read stay valid."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
