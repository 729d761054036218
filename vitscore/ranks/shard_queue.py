"""The hand-out: which shards this rank scores, one after the other.

All ranks count through the same order with one counter, so each shard is drawn once, and a fast rank draws more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, Self

from vitscore.shards.shard import Shard


class Counter(Protocol):
    """What the hand-out needs of the ranks."""

    @property
    def world_size(self) -> int: ...
    def next_position(self) -> int: ...


class ShardQueue:
    """Iterates over positions in the list of shards: largest first where sizes are known, finished ones skipped.

    Args:
        ranks: their shared counter.
        shards: the list, in the same order with the same sizes on every rank.
        done: ordinals that are not handed out.
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
        """Whether, at this rank's last draw, every rank could have drawn once more.

        Who draws ahead of its needs asks first, so that the last shards go to ranks that are idle.
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
