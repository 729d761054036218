"""The ranks of a run: who takes the next shard, what rank 0 tells the others, how the end is reported.

One process, or the ranks that accelerate or torchrun started. They share nothing but the process group's own key-value
store: a counter hands out shards, so that a fast rank takes more of them, and there is no collective in the loop nor
at the end. Keys carry a number of the run within the process and torchrun's restart count, so that a restarted job
never reads what its predecessor left in the store.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from vitscore.errors import SetupError, VitscoreError

POLL_S = 0.2
PR_SET_PDEATHSIG = 1
ERROR_KNOWN_S = 20.0
"""How long a failed rank waits for rank 0 to notice; rank 0 looks after every batch."""
PRINTING_S = 1.0
CONCLUSION_S = 20.0
_run_numbers = itertools.count()


class Store(Protocol):
    """The part of torch's key-value store that is used here."""

    def add(self, key: str, amount: int) -> int: ...
    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass
class LocalStore:
    """The store of a run with one process."""

    values: dict[str, bytes] = field(default_factory=dict)

    def add(self, key: str, amount: int) -> int:
        total = int(self.values.get(key, b"0")) + amount
        self.values[key] = str(total).encode()
        return total

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@dataclass
class Ranks:
    """This process' place among the ranks, and their shared store."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store: Store
    launcher: str
    """`none`, `accelerate` or `torchrun`; for the record."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def next_position(self) -> int:
        """The next position in the hand-out, of all ranks together; 0, 1, 2, ..."""
        return self.store.add("position", 1) - 1

    def count(self, name: str, amount: int) -> int:
        """Add to a counter of all ranks; returns the sum so far."""
        return self.store.add(f"count/{name}", amount)

    def publish(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def wait_for(self, key: str) -> Any:
        """What rank 0 published under `key`; raises the error of any rank that failed meanwhile."""
        while not self.store.check([key]):
            self.raise_reported_error()
            time.sleep(POLL_S)
        return json.loads(self.store.get(key))

    def report_error(self, error: BaseException, *, is_patient: bool = True) -> None:
        """Tell the other ranks; rank 0 alone prints, so an error anywhere is told once.

        A rank that is not 0 stays until rank 0 knows: launchers end all ranks with the first that fails.
        """
        if self.world_size == 1:
            return
        code = getattr(error, "exit_code", 1)
        text = str(error) if isinstance(error, VitscoreError) else f"rank {self.rank} ended: {error!r}"
        with contextlib.suppress(Exception):
            if not self.store.check(["error"]):
                self.publish("error", {"rank": self.rank, "code": code, "text": text})
            if self.is_main:
                self.publish("error known", True)
            if self.is_main or not is_patient:
                return
            deadline = time.monotonic() + ERROR_KNOWN_S
            while not self.store.check(["error known"]) and time.monotonic() < deadline:
                time.sleep(POLL_S)
            time.sleep(PRINTING_S)

    def raise_reported_error(self) -> None:
        """Raise the error that another rank has reported, if any."""
        if self.world_size == 1 or not self.store.check(["error"]):
            return
        found = json.loads(self.store.get("error"))
        if found["rank"] != self.rank:
            raise OtherRankError(found["text"], code=found["code"], rank=found["rank"])

    def finish(self) -> None:
        """Say that this rank has committed its last part."""
        self.store.set(f"done/{self.rank}", "1")

    def conclude(self) -> None:
        """On rank 0: the metrics are written; wait until the others know, since the store may end with this process."""
        self.publish("concluded", True)
        deadline = time.monotonic() + CONCLUSION_S
        while self.count("knowing", 0) < self.world_size - 1 and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def wait_for_conclusion(self) -> None:
        """On the other ranks: until rank 0 has written the metrics, or failed to."""
        self.wait_for("concluded")
        self.count("knowing", 1)

    def wait_for_all(self) -> Iterator[int]:
        """On rank 0: yield the number of ranks still at work until there is none; no time-out, a shard may be long."""
        while True:
            left = sum(not self.store.check([f"done/{rank}"]) for rank in range(self.world_size))
            if not left:
                return
            self.raise_reported_error()
            yield left
            time.sleep(POLL_S)


class OtherRankError(VitscoreError):
    """Another rank failed; rank 0 prints its text, the rest end quietly."""

    def __init__(self, text: str, *, code: int, rank: int) -> None:
        super().__init__(text.rstrip("."))
        self.exit_code = code
        self.rank = rank


def rank_from_environment() -> int:
    """The rank, before anything is imported: what decides who may print."""
    return int(os.environ.get("RANK", "0") or 0)


def world_from_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def join(device: str) -> Ranks:
    """Join the ranks that a launcher started, through accelerate; `device` is cpu or cuda.

    Raises:
        SetupError: the process group could not be built.
    """
    run_number = next(_run_numbers)
    launcher = "none"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = "torchrun"
    if any(name.startswith("ACCELERATE_") for name in os.environ):
        launcher = "accelerate"
    if world_from_environment() == 1:
        return Ranks(0, 1, 0, 1, LocalStore(), launcher)
    from accelerate import PartialState
    from torch.distributed import distributed_c10d

    try:
        state = PartialState(cpu=device == "cpu", timeout=timedelta(minutes=10))
    except (RuntimeError, ValueError, OSError) as error:
        raise SetupError(
            "ranks could not meet",
            where=f"rank {rank_from_environment()} of {world_from_environment()}",
            got=str(error).splitlines()[0],
            next_step="Check MASTER_ADDR, MASTER_PORT and that every rank was started.",
        ) from error
    if run_number == 0:
        end_with_launcher()
        atexit.register(leave)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store: Any = distributed_c10d.PrefixStore(f"vitscore/{restart}/{run_number}", distributed_c10d._get_default_store())
    return Ranks(
        rank=state.process_index,
        world_size=state.num_processes,
        local_rank=state.local_process_index,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        store=store,
        launcher=launcher,
    )


def leave() -> None:
    """Take the process group down, so that the interpreter ends without warnings."""
    from torch import distributed

    with contextlib.suppress(Exception):
        distributed.destroy_process_group()


def end_with_launcher() -> None:
    """Have this process get SIGTERM when the launcher that started it dies; only Linux can."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def is_lost_connection(error: Exception) -> bool:
    """Whether torch says that the ranks' store or process group is gone."""
    return type(error).__name__.startswith("Dist")
