"""Queue of the shards that this rank scores.

All ranks draw from the same order with one shared counter, so every shard is drawn once, and a fast rank draws more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, Self

from vitscore.shards.shard import Shard


class Counter(Protocol):
    """The attributes of `Ranks` that the queue uses."""

    @property
    def world_size(self) -> int: ...
    def next_position(self) -> int: ...


class ShardQueue:
    """Iterates over positions in the list of shards: largest first if all sizes are known, without finished shards.

    Args:
        ranks: the ranks, with their shared counter.
        shards: the shards, in the same order and with the same sizes on every rank.
        done: ordinals of finished shards, which are skipped.
    """

    def __init__(self, ranks: Counter, shards: Sequence[Shard], done: Collection[int]) -> None:
        self._ranks = ranks
        self._shards = shards
        self._done = done
        self._order = list(range(len(shards)))
        if all(shard.num_bytes is not None for shard in shards):
            self._order.sort(key=lambda position: -(shards[position].num_bytes or 0))
        self._num_drawn = 0

    def has_more_for_all(self) -> bool:
        """Return whether, at this rank's last draw, there was at least one more shard for every rank.

        A rank checks this before it draws a shard in advance, so that the last shards go to idle ranks.
        """
        return len(self._order) - self._num_drawn >= self._ranks.world_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        while (drawn := self._ranks.next_position()) < len(self._order):
            self._num_drawn = drawn + 1
            position = self._order[drawn]
            if self._shards[position].ordinal not in self._done:
                return position
        self._num_drawn = len(self._order)
        raise StopIteration
