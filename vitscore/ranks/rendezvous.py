"""How the ranks of one start find each other, and nobody of an earlier one.

torchrun's store outlives a restart of the ranks, and torch puts the addresses of the processes into it under names
that do not change: a rank that starts again may read the address of a process that is gone, and its process group
fails. The restart count that torchrun gives is each node's own, so it can't tell the starts apart either. So the ranks
agree on a name for this very start first, and everything else is kept under it.

    rank 0:  hello: its word ───────────────► waits for answers to its word ─► agreed: all words
    rank n:  answer n: hello's word, its own ─► until `agreed` holds its own word (a new hello: it answers again)

Words are random and made by each process. Rank 0 takes answers to its own word alone, and a rank takes an agreement
that holds its own word alone, so neither can be from a process that is gone.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

POLL_S = 0.05
RENDEZVOUS_S = 600.0
"""How long ranks wait for the last one to start."""


class RendezvousError(RuntimeError):
    """Not all ranks came."""


def agree(store: Any, *, rank: int, world_size: int, timeout_s: float = RENDEZVOUS_S) -> str:
    """A name for this start of the ranks, the same on all of them and never used before.

    Args:
        store: torch's key-value store that all ranks see; it may hold what earlier starts left.
        rank: this one.
        world_size: how many there are.
        timeout_s: how long to wait for the others.

    Raises:
        RendezvousError: not all ranks came in time.
    """
    word = secrets.token_hex(8)
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        store.set("vitscore/hello", word)
        store.set("vitscore/agreed", json.dumps([word, *_answers(store, word, world_size, deadline)]))
        return word
    answered = ""
    while time.monotonic() < deadline:
        hello = _read(store, "vitscore/hello")
        if hello and hello != answered:
            store.set(f"vitscore/answer/{rank}", json.dumps([hello, word]))
            answered = hello
        words = json.loads(_read(store, "vitscore/agreed") or "[]")
        if len(words) > rank and words[rank] == word:
            name: str = words[0]
            return name
        time.sleep(POLL_S)
    raise RendezvousError("rank 0 did not come")


def _answers(store: Any, word: str, world_size: int, deadline: float) -> list[str]:
    """The words of the other ranks, in their order."""
    found: dict[int, str] = {}
    while len(found) < world_size - 1:
        for rank in range(1, world_size):
            hello, answer = json.loads(_read(store, f"vitscore/answer/{rank}") or '["", ""]')
            if rank not in found and hello == word:
                found[rank] = answer
        if time.monotonic() > deadline:
            missing = next(rank for rank in range(1, world_size) if rank not in found)
            raise RendezvousError(f"rank {missing} did not come")
        if len(found) < world_size - 1:
            time.sleep(POLL_S)
    return [found[rank] for rank in range(1, world_size)]


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
