"""Agreement of the ranks of one start on a unique name, which separates them from the ranks of earlier starts.

torchrun's store outlives a restart of the ranks, and torch stores the addresses of the processes under fixed keys: a
restarted rank may read the address of a dead process, and its process group fails. torchrun's restart count does not
identify a start either, because every node counts separately. The ranks therefore first agree on a name for this start,
and all other keys are kept under that name.

    rank 0:  hello: its token ────────────────────► waits for answers to its token ─► agreed: all tokens
    rank n:  answer n: hello's token and its own ─► waits until `agreed` holds its token (answers a new hello again)

Every process makes a random token. Rank 0 accepts only answers to its own token, and another rank accepts only an
agreement that holds its own token, so neither can come from a dead process.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

POLL_S = 0.05
RENDEZVOUS_S = 600.0
"""How long ranks wait for the last rank to start."""


class RendezvousError(RuntimeError):
    """Not all ranks arrived in time."""


def agree(store: Any, *, rank: int, world_size: int, timeout_s: float = RENDEZVOUS_S) -> str:
    """Agree on a name for this start of the ranks: the same on all ranks, and never used before.

    Args:
        store: torch's key-value store that all ranks share; it may hold keys of earlier starts.
        rank: this rank.
        world_size: the number of ranks.
        timeout_s: how long to wait for the other ranks.

    Raises:
        RendezvousError: not all ranks arrived in time.
    """
    token = secrets.token_hex(8)
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        store.set("vitscore/hello", token)
        store.set("vitscore/agreed", json.dumps([token, *_answers(store, token, world_size, deadline)]))
        return token
    answered = ""
    while time.monotonic() < deadline:
        hello = _read(store, "vitscore/hello")
        if hello and hello != answered:
            store.set(f"vitscore/answer/{rank}", json.dumps([hello, token]))
            answered = hello
        tokens = json.loads(_read(store, "vitscore/agreed") or "[]")
        if len(tokens) > rank and tokens[rank] == token:
            name: str = tokens[0]
            return name
        time.sleep(POLL_S)
    raise RendezvousError("rank 0 did not arrive")


def _answers(store: Any, token: str, world_size: int, deadline: float) -> list[str]:
    """Wait for the tokens of the other ranks; return them in the order of ranks."""
    tokens: dict[int, str] = {}
    while len(tokens) < world_size - 1:
        for rank in range(1, world_size):
            hello, answer = json.loads(_read(store, f"vitscore/answer/{rank}") or '["", ""]')
            if rank not in tokens and hello == token:
                tokens[rank] = answer
        if time.monotonic() > deadline:
            missing = next(rank for rank in range(1, world_size) if rank not in tokens)
            raise RendezvousError(f"rank {missing} did not arrive")
        if len(tokens) < world_size - 1:
            time.sleep(POLL_S)
    return [tokens[rank] for rank in range(1, world_size)]


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
