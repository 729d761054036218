"""What the first members of the first shard say about a corpus: how large they are, and about how many there are.

For an automatic choice only (the batch size); whatever cannot be seen at once, on this machine's disk and uncompressed,
is not looked at. Nothing depends on it but speed.
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
    """How large the first members are, and how many members there would be if all were like them."""

    largest_bytes: int
    num_members: int


def look(shards: Sequence[Shard]) -> Preview | None:
    """A first look at the shards; None where the first one is elsewhere, compressed, empty or no tar."""
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
    each = (last.offset_data + last.size) / len(members)
    all_bytes = sum(shard.num_bytes or 0 for shard in shards)
    return Preview(max(member.size for member in members), int(all_bytes / each))
