"""The shard queue: every shard once, the largest first, and the last shards not drawn in advance."""

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest

from vitscore.ranks.shard_queue import ShardQueue
from vitscore.shards.shard import Shard


@dataclass
class Ranks:
    world_size: int
    drawn: Any = field(default_factory=count)

    def next_position(self) -> int:
        return next(self.drawn)


def shards(*sizes: int | None) -> list[Shard]:
    return [Shard(ordinal, f"{ordinal}.tar", f"{ordinal}.tar", size) for ordinal, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "order"), [((1, 3, 2), [1, 2, 0]), ((1, None, 2), [0, 1, 2]), ((5, 5, 5), [0, 1, 2]), ((), [])]
)
def test_the_largest_shards_come_first_if_sizes_are_known(sizes: tuple[int | None, ...], order: list[int]) -> None:
    assert list(ShardQueue(Ranks(1), shards(*sizes), set())) == order


def test_ranks_draw_each_shard_once_and_no_finished_one() -> None:
    ranks = Ranks(2)
    one, other = (ShardQueue(ranks, shards(*range(9)), {3, 8}) for _ in range(2))
    drawn = [next(one), next(other), next(other), *one, *other]
    assert sorted(drawn) == [0, 1, 2, 4, 5, 6, 7]


def test_the_last_shards_are_left_to_idle_ranks() -> None:
    positions = ShardQueue(Ranks(3), shards(*range(5)), set())
    told = []
    for _ in positions:
        told.append(positions.has_more_for_all())
    assert told == [True, True, False, False, False]
    assert not positions.has_more_for_all()
