"""Summarise shards: counts of samples, formats and classes, and the table of members.

Serves `shards ls` and `shards index`. Reads indexes and labels but no images; `shards verify` decodes those.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from vitscore.shards.grouping import split_name
from vitscore.shards.labels import LabelRule
from vitscore.shards.remote.cache import Cache
from vitscore.shards.samples import OpenShard
from vitscore.shards.shard import Shard

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class ShardSummary:
    """Counts of one shard; `label_ids` are the class ids of its labels under the given rule."""

    name: str
    num_samples: int
    num_bytes: int | None
    formats: dict[str, int]
    label_ids: frozenset[int]
    num_unlabelled: int
    reasons: dict[str, int]
    fault: str | None
    notes: tuple[str, ...]

    @property
    def num_bad(self) -> int:
        return sum(self.reasons.values())


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One member of a shard; `key` and `extension` are None if it belongs to no sample."""

    shard: str
    member: str
    key: str | None
    extension: str | None
    offset: int
    size: int


def summarise_shard(
    shard: Shard, *, labels: LabelRule, image_key: str | None = None, cache: Cache | None = None
) -> ShardSummary:
    """Count the contents of a shard; a remote or compressed shard is brought into the cache."""
    with OpenShard(shard, labels=labels, image_key=image_key, will_read=False, cache=cache) as opened:
        formats: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        label_ids: set[int] = set()
        num_unlabelled = 0
        for row in range(opened.num_samples):
            extension = opened.image_extension(row)
            if extension is not None:
                formats[extension] += 1
        for start in range(0, opened.num_samples, ROWS_AT_ONCE):
            ids, row_reasons = opened.read_labels(start, start + ROWS_AT_ONCE)
            label_ids.update(ids[ids >= 0].tolist())
            is_ok = [reason is None for reason in row_reasons]
            num_unlabelled += sum(ok and label < 0 for ok, label in zip(is_ok, ids.tolist(), strict=True))
            reasons.update(reason.split(": ", 1)[0] for reason in row_reasons if reason is not None)
        return ShardSummary(
            name=shard.name,
            num_samples=opened.num_samples,
            num_bytes=opened.num_bytes,
            formats=dict(sorted(formats.items())),
            label_ids=frozenset(label_ids),
            num_unlabelled=num_unlabelled,
            reasons=dict(sorted(reasons.items())),
            fault=opened.fault,
            notes=tuple(opened.notes),
        )


def index_rows(shard: Shard, *, cache: Cache | None = None) -> tuple[Iterator[IndexRow], str | None]:
    """Return the regular members of a shard in order, and its fault; offsets refer to the unpacked tar."""
    with OpenShard(shard, labels=LabelRule(None), will_read=False, cache=cache) as opened:
        index = opened.index
    columns = zip(index.names, index.offsets, index.sizes, strict=True)
    return (_index_row(shard.name, *fields) for fields in columns), index.fault


def _index_row(shard: str, member: str, offset: int, size: int) -> IndexRow:
    key, extension = split_name(member) or (None, None)
    return IndexRow(shard, member, key, extension, offset, size)


def common_folder(names: list[str]) -> str:
    """Return the folder that all names share, with a trailing slash, or an empty string if there is none."""
    folders = {os.path.dirname(name) for name in names}
    return os.path.join(folders.pop(), "") if len(folders) == 1 and "" not in folders else ""
