"""The ranks of a run: who takes the next shard, what rank 0 tells the others, how the end is reported.

One process, or the ranks that accelerate or torchrun started. They share nothing but the process group's own key-value
store: a counter hands out shards, so that a fast rank takes more of them, and there is no collective in the loop nor
at the end. Keys carry the name of this start (see meeting) and a number of the run within the process, so that a
restarted job never reads what its predecessor left in the store.

Nobody waits by the clock: a shard may take as long as it takes. Instead every rank gives a sign of life from a thread
of its own, rank 0 listens to all and all listen to rank 0, so that a rank that froze or whose machine is gone ends the
run with a line that names it.
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
"""Characters of a long value that go into the store at once."""
BEAT_S = 2.0
SILENCE_S = 60.0
"""Without a sign of life for so long, a rank counts as dead; the thread that gives it needs only a moment of Python."""
ERROR_KNOWN_S = 20.0
"""How long a failed rank waits for rank 0 to notice; rank 0 looks after every batch."""
SHARED_S = 30.0
"""How long what one node wrote may take to be seen on another."""
PRINTING_S = 1.0
ANNOUNCE_S = 20.0
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
    heart: Heart | None = None

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
        """What rank 0 published under `key`; raises the error of any rank that failed meanwhile."""
        while not self.store.check([key]):
            self.raise_reported_error()
            time.sleep(POLL_S)
        return json.loads(self.store.get(key))

    def loops(self) -> list[tuple[float, float]]:
        """On rank 0, when all are done: when each rank's loop began and ended, in seconds since the first one began."""
        times = [json.loads(self.store.get(f"loop/{rank}")) for rank in range(self.world_size)]
        first = min(began for began, _ in times)
        return [(began - first, ended - first) for began, ended in times]

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
            raise OtherRankError(found["text"], code=found["code"], is_told=found.get("told by", 0) == self.rank)

    def require_group(self) -> None:
        """Raise unless the run still wants this rank's results: before each commit.

        Raises:
            SetupError: the launcher is gone.
            OtherRankError: another rank failed.
        """
        if not launcher.is_alive():
            raise SetupError("the launcher is gone", next_step="The same command goes on from the parts that are done.")
        self.raise_reported_error()

    def close(self) -> None:
        """Give no more signs of life."""
        if self.heart is not None:
            self.heart.stop()

    def finish(self) -> None:
        """Say that this rank has committed its last part."""
        self.store.set(f"done/{self.rank}", "1")

    def announce_metrics(self) -> None:
        """On rank 0: the metrics are written; wait until the others know, since the store may end with this process."""
        self.publish("metrics written", True)
        deadline = time.monotonic() + ANNOUNCE_S
        while self.count("metrics known", 0) < self.world_size - 1 and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def wait_for_metrics(self) -> None:
        """On the other ranks: until rank 0 has written the metrics, or failed to."""
        self.wait_for("metrics written")
        self.count("metrics known", 1)

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
    """Another rank failed; one rank prints its text (`is_told`), the rest end quietly."""

    def __init__(self, text: str, *, code: int, is_told: bool) -> None:
        super().__init__(text.rstrip("."))
        self.exit_code = code
        self.is_told = is_told


class TooManyRanksError(SetupError):
    """A node has more ranks than GPUs; one rank of it prints that (`is_told`), the rest end quietly."""

    def __init__(self, *, num_gpus: int, num_ranks: int, is_told: bool) -> None:
        found = f"{num_gpus} rank{'s' * (num_gpus > 1)} on this node ({num_gpus} CUDA device{'s' * (num_gpus > 1)})"
        fewer = f"--nproc-per-node {num_gpus}"
        if launcher.name() == "accelerate":
            fewer = f"--num_processes {num_gpus * world_from_environment() // num_ranks}"
        super().__init__(
            "more ranks than GPUs",
            where=f"local rank {num_gpus}",
            expected=f"at most {found}",
            got=str(num_ranks),
            next_step=f"Start with {fewer}, or --device cpu.",
        )
        self.is_told = is_told


class Heart:
    """Gives this rank's signs of life, and listens to others'; reports the first that falls silent, as an error.

    Args:
        store: shared by the ranks.
        rank: this one.
        others: whom to listen to.
    """

    def __init__(self, store: Store, *, rank: int, others: Sequence[int]) -> None:
        self._store = store
        self._rank = rank
        self._last = {other: (-1, time.monotonic()) for other in others}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        # A store that is lost is the main thread's to notice.
        with contextlib.suppress(Exception):
            while not self._is_over.wait(BEAT_S):
                self._store.add(f"beat/{self._rank}", 1)
                for other in self._last:
                    self._listen(other)

    def _listen(self, other: int) -> None:
        beats, now = self._store.add(f"beat/{other}", 0), time.monotonic()
        known, since = self._last[other]
        if beats != known:
            self._last[other] = beats, now
        elif now - since > SILENCE_S and not self._store.check(["error"]):
            dead = SetupError(
                "a rank died",
                where=f"rank {other}",
                got=f"no sign of life for {SILENCE_S:.0f} s",
                next_step="The same command goes on from the parts that are done.",
            )
            told_by = 0 if other else 1
            report = {"rank": other, "code": dead.exit_code, "text": str(dead), "told by": told_by}
            self._store.set("error", json.dumps(report))


def rank_from_environment() -> int:
    """The rank, before anything is imported: what decides who may print."""
    return int(os.environ.get("RANK", "0") or 0)


def world_from_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def join(device: str) -> Ranks:
    """Join the ranks that a launcher started, through accelerate; `device` is cpu or cuda.

    Raises:
        SetupError: the process group could not be built, or this node has more ranks than GPUs.
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
        heart=Heart(store, rank=rank, others=[0] if rank else range(1, world_size)),
    )


def require_a_gpu_each() -> None:
    """Refuse a node's ranks that are more than its GPUs, before they wait for each other.

    A rank takes the GPU of its own number. torch fails where there is none of that number, in words of the network.

    Raises:
        TooManyRanksError: on every rank of the node; but for the first one later, since a launcher ends all ranks with
            the first that fails.
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
    """What torch needs to build the process group of this start, and of no earlier one."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous as torch_rendezvous

    store, rank, world_size = next(torch_rendezvous("env://", timeout=timedelta(seconds=rendezvous.RENDEZVOUS_S)))
    start = rendezvous.agree(store, rank=rank, world_size=world_size)
    return {"store": PrefixStore(f"vitscore/{start}", store), "rank": rank, "world_size": world_size}


def leave() -> None:
    """Take the process group down, so that the interpreter ends without warnings."""
    from torch import distributed

    with contextlib.suppress(Exception):
        distributed.destroy_process_group()


def is_lost_connection(error: Exception) -> bool:
    """Whether torch says that the ranks' store or process group is gone."""
    return type(error).__name__.startswith("Dist")
