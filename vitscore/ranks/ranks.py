"""The ranks of a run: sharing out shards, passing data from rank 0 to the others, reporting errors and the end.

A run has one process, or the ranks that accelerate or torchrun started. Ranks share only the key-value store of the
process group. A counter in it assigns shards, so that a fast rank takes more of them, and no collective is used in the
loop or at the end. Keys contain the name of this start (see `rendezvous`) and the run's number within the process, so
that a restarted job never reads values that an earlier one left in the store.

No wait for another rank's work has a time-out, because a shard may take any time. Instead every rank sends a heartbeat
from a thread. Rank 0 checks the heartbeats of all ranks, and all ranks check rank 0's, so that a frozen rank or a lost
machine ends the run with an error that names the rank.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import itertools
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from vitscore.errors import SetupError, VitscoreError
from vitscore.ranks import rendezvous
from vitscore.system import launcher

POLL_S = 0.2
PIECE_CHARS = 4 << 20
"""Most characters of a long value that are stored under one key."""
BEAT_S = 2.0
"""Interval between heartbeats."""
SILENCE_S = 60.0
"""A rank without a heartbeat for this long counts as dead; the thread that sends it needs little of Python's time."""
ERROR_KNOWN_S = 20.0
"""How long a failed rank waits for rank 0 to notice; rank 0 checks after every batch."""
SHARED_S = 30.0
"""How long a file written on one node may take to appear on another."""
PRINTING_S = 1.0
"""How long a failed rank then waits for rank 0 to print the error."""
ANNOUNCE_S = 20.0
"""How long rank 0 waits at the end for the other ranks to read that the metrics are written."""
_run_numbers = itertools.count()


class Store(Protocol):
    """The methods of torch's key-value store that are used here."""

    def add(self, key: str, amount: int) -> int: ...
    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass
class LocalStore:
    """Store of a run with one process."""

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
    """This process' rank, and the store that it shares with the other ranks."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store: Store
    heartbeat: Heartbeat | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def next_position(self) -> int:
        """Take the next position in the shared order of shards: 0, 1, 2, ... over all ranks together."""
        return self.store.add("position", 1) - 1

    def count(self, name: str, amount: int) -> int:
        """Add to a counter that all ranks share; return the sum so far."""
        return self.store.add(f"count/{name}", amount)

    def publish(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def publish_long(self, key: str, value: Any) -> None:
        """Publish a value of any size, compressed and in pieces: the store takes 8 MB at a time."""
        text = base64.b85encode(zlib.compress(json.dumps(value).encode())).decode()
        pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
        for number, piece in enumerate(pieces):
            self.store.set(f"{key}/{number}", piece)
        self.publish(key, len(pieces))

    def wait_for_long(self, key: str) -> Any:
        """Return a value that rank 0 published with `publish_long`; see `wait_for`."""
        num_pieces = self.wait_for(key)
        packed = b"".join(self.store.get(f"{key}/{number}") for number in range(num_pieces))
        return json.loads(zlib.decompress(base64.b85decode(packed)))

    def wait_for(self, key: str) -> Any:
        """Wait for the value that rank 0 publishes under `key`; raise the error of a rank that fails meanwhile."""
        while not self.store.check([key]):
            self.raise_reported_error()
            time.sleep(POLL_S)
        return json.loads(self.store.get(key))

    def loops(self) -> list[tuple[float, float]]:
        """On rank 0, after all ranks are done: return when each rank's loop began and ended.

        Times are in seconds since the first loop began.
        """
        times = [json.loads(self.store.get(f"loop/{rank}")) for rank in range(self.world_size)]
        first = min(began for began, _ in times)
        return [(began - first, ended - first) for began, ended in times]

    def report_error(self, error: BaseException, *, is_patient: bool = True) -> None:
        """Report an error to the other ranks. Only rank 0 prints, so that an error on any rank is printed once.

        The other ranks wait until rank 0 has read the error, since a launcher ends all ranks when the first one fails.

        Args:
            error: the error.
            is_patient: whether to wait for rank 0.
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
        report = json.loads(self.store.get("error"))
        if report["rank"] != self.rank:
            is_printer = report.get("printed by", 0) == self.rank
            raise OtherRankError(report["text"], code=report["code"], is_told=is_printer)

    def require_group(self) -> None:
        """Raise if this rank must not commit any more; called before every commit.

        Raises:
            SetupError: the launcher is gone.
            OtherRankError: another rank failed.
        """
        if not launcher.is_alive():
            raise SetupError("the launcher is gone", next_step="Run the same command again to resume.")
        self.raise_reported_error()

    def close(self) -> None:
        """Stop the heartbeat."""
        if self.heartbeat is not None:
            self.heartbeat.stop()

    def finish(self) -> None:
        """Report that this rank has committed its last part."""
        self.store.set(f"done/{self.rank}", "1")

    def announce_metrics(self) -> None:
        """On rank 0: announce that the metrics are written.

        Wait until the other ranks have read it, since the store may end with this process.
        """
        self.publish("metrics written", True)
        deadline = time.monotonic() + ANNOUNCE_S
        while self.count("metrics known", 0) < self.world_size - 1 and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def wait_for_metrics(self) -> None:
        """On the other ranks: wait until rank 0 has written the metrics or failed."""
        self.wait_for("metrics written")
        self.count("metrics known", 1)

    def wait_for_all(self) -> Iterator[int]:
        """On rank 0: yield the number of ranks still at work until there are none. There is no time-out."""
        while True:
            left = sum(not self.store.check([f"done/{rank}"]) for rank in range(self.world_size))
            if not left:
                return
            self.raise_reported_error()
            yield left
            time.sleep(POLL_S)


class OtherRankError(VitscoreError):
    """Another rank failed. One rank prints its message (`is_told`); the others exit silently."""

    def __init__(self, text: str, *, code: int, is_told: bool) -> None:
        super().__init__(text.rstrip("."))
        self.exit_code = code
        self.is_told = is_told


class TooManyRanksError(SetupError):
    """A node has more ranks than GPUs. One of its ranks prints the message (`is_told`); the others exit silently."""

    def __init__(self, *, num_gpus: int, num_ranks: int, is_told: bool) -> None:
        most = f"{num_gpus} rank{'s' * (num_gpus > 1)} on this node ({num_gpus} CUDA device{'s' * (num_gpus > 1)})"
        fewer = f"--nproc-per-node {num_gpus}"
        if launcher.name() == "accelerate":
            fewer = f"--num_processes {num_gpus * world_from_environment() // num_ranks}"
        super().__init__(
            "more ranks than GPUs",
            where=f"local rank {num_gpus}",
            expected=f"at most {most}",
            got=str(num_ranks),
            next_step=f"Start with {fewer}, or --device cpu.",
        )
        self.is_told = is_told


class Heartbeat:
    """Thread that sends this rank's heartbeats and checks other ranks'; reports the first rank that stops as an error.

    Args:
        store: the store that the ranks share.
        rank: this rank.
        others: the ranks to check.
    """

    def __init__(self, store: Store, *, rank: int, others: Sequence[int]) -> None:
        self._store = store
        self._rank = rank
        self._last = {other: (-1, time.monotonic()) for other in others}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        # A lost store is noticed and reported by the main thread.
        with contextlib.suppress(Exception):
            while not self._is_over.wait(BEAT_S):
                self._store.add(f"beat/{self._rank}", 1)
                for other in self._last:
                    self._check(other)

    def _check(self, other: int) -> None:
        beats, now = self._store.add(f"beat/{other}", 0), time.monotonic()
        known, since = self._last[other]
        if beats != known:
            self._last[other] = beats, now
        elif now - since > SILENCE_S and not self._store.check(["error"]):
            dead = SetupError(
                "a rank died",
                where=f"rank {other}",
                got=f"no heartbeat for {SILENCE_S:.0f} s",
                next_step="Run the same command again to resume.",
            )
            printer = 0 if other else 1
            report = {"rank": other, "code": dead.exit_code, "text": str(dead), "printed by": printer}
            self._store.set("error", json.dumps(report))


def rank_from_environment() -> int:
    """Return this process' rank without importing torch; it decides which process prints."""
    return int(os.environ.get("RANK", "0") or 0)


def world_from_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def join(device: str) -> Ranks:
    """Join the ranks that a launcher started, through accelerate; `device` is cpu or cuda.

    Raises:
        SetupError: the process group cannot be built, or this node has more ranks than GPUs.
    """
    run_number = next(_run_numbers)
    if world_from_environment() == 1:
        return Ranks(0, 1, 0, 1, LocalStore())
    launcher.end_with_launcher()
    if device == "cuda":
        require_a_gpu_each()
    from accelerate import PartialState
    from torch import distributed
    from torch.distributed import distributed_c10d

    try:
        given = {} if distributed.is_initialized() else _shared_store()
        state = PartialState(cpu=device == "cpu", timeout=timedelta(seconds=rendezvous.RENDEZVOUS_S), **given)
    except (RuntimeError, ValueError, OSError) as error:
        raise SetupError(
            "ranks could not meet",
            where=f"rank {rank_from_environment()} of {world_from_environment()}",
            got=str(error).splitlines()[0],
            next_step="Check MASTER_ADDR, MASTER_PORT and that every rank was started.",
        ) from error
    if run_number == 0:
        atexit.register(leave)
    store: Any = distributed_c10d.PrefixStore(f"vitscore/{run_number}", distributed_c10d._get_default_store())
    rank, world_size = state.process_index, state.num_processes
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=state.local_process_index,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        store=store,
        heartbeat=Heartbeat(store, rank=rank, others=[0] if rank else range(1, world_size)),
    )


def require_a_gpu_each() -> None:
    """Raise if this node has more ranks than GPUs, before the ranks wait for each other.

    A rank uses the GPU with its local number. If there is no such GPU, torch fails with a network error.

    Raises:
        TooManyRanksError: on every rank of the node. All but the first rank raise it later, since a launcher ends all
            ranks when the first one fails.
    """
    import torch

    num_gpus, num_ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not 0 < num_gpus < num_ranks:
        return
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first:
        time.sleep(ERROR_KNOWN_S)
    raise TooManyRanksError(num_gpus=num_gpus, num_ranks=num_ranks, is_told=is_first)


def _shared_store() -> dict[str, Any]:
    """Return arguments with which torch builds the process group of this start, separate from earlier starts."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous as torch_rendezvous

    store, rank, world_size = next(torch_rendezvous("env://", timeout=timedelta(seconds=rendezvous.RENDEZVOUS_S)))
    start = rendezvous.agree(store, rank=rank, world_size=world_size)
    return {"store": PrefixStore(f"vitscore/{start}", store), "rank": rank, "world_size": world_size}


def leave() -> None:
    """Destroy the process group, so that the interpreter exits without warnings."""
    from torch import distributed

    with contextlib.suppress(Exception):
        distributed.destroy_process_group()


def is_lost_connection(error: Exception) -> bool:
    """Return whether the error means that the ranks' store or process group is lost."""
    return type(error).__name__.startswith("Dist")
