"""Estimate the size and number of a corpus's members from the first members of its first shard.

Used only to choose the batch size, so the estimate affects speed but no result. Only an uncompressed shard on a local
disk is inspected.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

from vitscore.shards.redaction import is_remote
from vitscore.shards.shard import Shard

_NUM_LOOKED_AT = 64


@dataclass(frozen=True)
class Preview:
    """The largest of the first members, and the number of members if all have the average size of the first ones."""

    largest_bytes: int
    num_members: int


def look(shards: Sequence[Shard]) -> Preview | None:
    """Inspect the first shard; return None if it is missing, remote, compressed, empty or not a tar."""
    if not shards or is_remote(shards[0].path):
        return None
    try:
        with tarfile.open(shards[0].path, "r:") as tar:
            members = list(itertools.islice(tar, _NUM_LOOKED_AT))
    except (OSError, tarfile.TarError, ValueError):
        return None
    if not members:
        return None
    last = members[-1]
    bytes_per_member = (last.offset_data + last.size) / len(members)
    all_bytes = sum(shard.num_bytes or 0 for shard in shards)
    return Preview(max(member.size for member in members), int(all_bytes / bytes_per_member))
