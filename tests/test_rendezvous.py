"""Ranks of one start agree on a name that no earlier start had, even if the store still holds keys of those."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from vitscore.ranks import rendezvous


def agree_all(store: HashStore, world_size: int, *, delays: dict[int, float] | None = None) -> list[str]:
    def agree(rank: int) -> str:
        time.sleep((delays or {}).get(rank, 0))
        return rendezvous.agree(store, rank=rank, world_size=world_size, timeout_s=20)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(agree, range(world_size)))


def test_every_start_has_a_unique_name():
    store = HashStore()
    names = []
    for delays in ({}, {0: 0.5}, {1: 0.5}, {2: 0.5, 0: 0.2}):
        agreed = agree_all(store, 3, delays=delays)
        assert len(set(agreed)) == 1
        names.append(agreed[0])
    assert len(set(names)) == len(names)


def test_keys_of_a_failed_start_are_not_taken_for_answers():
    store = HashStore()
    with pytest.raises(rendezvous.RendezvousError, match="rank 1"):
        rendezvous.agree(store, rank=0, world_size=2, timeout_s=0.2)
    old = store.get("vitscore/hello").decode()
    store.set("vitscore/answer/1", json.dumps([old, "dead"]))
    store.set("vitscore/agreed", json.dumps([old, "dead"]))
    names: list[str] = []
    late = threading.Thread(target=lambda: names.append(rendezvous.agree(store, rank=1, world_size=2, timeout_s=20)))
    late.start()
    time.sleep(0.3)
    assert not names, "rank 1 accepted an agreement of a dead process"
    assert [rendezvous.agree(store, rank=0, world_size=2, timeout_s=20)] == (late.join() or names)
    assert names != [old]


def test_a_rank_whose_rank_0_does_not_arrive_raises():
    with pytest.raises(rendezvous.RendezvousError, match="rank 0"):
        rendezvous.agree(HashStore(), rank=1, world_size=2, timeout_s=0.2)
