"""Progress of a run: every rank adds its counts to sums in the store, and rank 0 passes the sums to its observer.

No part and no metric depends on these counts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vitscore.engine.tally import Tally
    from vitscore.plan.plan import Plan
    from vitscore.ranks.ranks import Ranks

REPORT_EVERY_S = 0.5


@dataclass(frozen=True)
class Progress:
    """Progress of all ranks together."""

    images: int
    bad: int
    bytes_done: float
    bytes_total: float | None
    shards_done: int
    shards_total: int
    seconds: float
    """Seconds since the first batch of this start was scored."""
    images_at_start: int
    accuracy: Mapping[str, float | None]
    """Running accuracy by model, on rank 0's images only."""


class Observer(Protocol):
    """Receives a run's events on rank 0."""

    def planned(self, plan: Plan, *, num_done: int) -> None: ...
    def loaded(self, notes: Sequence[str]) -> None: ...
    def progressed(self, state: Progress) -> None: ...
    def waiting(self, num_ranks: int) -> None: ...
    def finished(self) -> None: ...


class Reporter:
    """Adds this rank's counts to the sums of all ranks, twice a second, and passes the sums to rank 0's observer."""

    def __init__(self, ranks: Ranks, plan: Plan, num_done: int, observer: Observer) -> None:
        self._ranks = ranks
        self._observer = observer
        self._plan = plan
        self._num_done = num_done
        sizes = [shard.num_bytes for shard in plan.shards]
        self._bytes_total = None if None in sizes else float(sum(size or 0 for size in sizes))
        self._reported = {"images": 0, "bad_seen": 0, "kilobytes": 0, "shards": 0}
        self._started: float | None = None
        self._images_at_start = 0
        self._next = 0.0

    def __call__(self, tally: Tally) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REPORT_EVERY_S
        here = {
            "images": tally.images,
            "bad_seen": tally.bad,
            "kilobytes": int(tally.bytes / 1024),
            "shards": tally.shards,
        }
        total = {name: self._ranks.count(name, here[name] - self._reported[name]) for name in here}
        self._reported = here
        if self._started is None:
            self._started, self._images_at_start = now, total["images"]
        if self._ranks.is_main:
            self._observer.progressed(
                Progress(
                    images=total["images"],
                    bad=total["bad_seen"],
                    bytes_done=1024.0 * total["kilobytes"],
                    bytes_total=self._bytes_total,
                    shards_done=self._num_done + total["shards"],
                    shards_total=len(self._plan.shards),
                    seconds=now - self._started,
                    images_at_start=self._images_at_start,
                    accuracy={model.name: tally.accuracy(model.name) for model in self._plan.models},
                )
            )
