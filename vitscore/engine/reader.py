"""Shards to batches: takes shards from the queue, reads their samples, fills batches across shard borders.

Runs in a thread, ahead of the decoder by a bounded number of batches; shards that have to be fetched or unpacked are
fetched ahead of it (see `shards.remote.cache`). Samples that are bad before they are decoded (no image, a wrong label)
take no place in a batch: they travel beside it, with their reason. It knows nothing of parts: the engine opens them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitscore.plan.plan import Plan
from vitscore.ranks.shard_queue import HandOut
from vitscore.shards.files import ShardFile
from vitscore.shards.remote.cache import Cache, fetch_ahead
from vitscore.shards.remote.retries import Abandoned
from vitscore.shards.samples import OpenShard, SampleBlock
from vitscore.shards.shard import Shard

Array = np.ndarray[Any, Any]
MOST_OPENED = 64
"""Shards that one batch may open; without it, empty shards would be gathered without end."""


@dataclass(frozen=True, eq=False)
class ShardSamples:
    """A shard as it was read: the keys of the samples that count, and its faults."""

    shard: Shard
    keys: Sequence[str]
    num_bytes: int | None
    fault: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """Images of one shard that lie side by side in a batch."""

    samples: ShardSamples
    rows: Array
    """Row numbers in the shard, ascending."""
    labels: Array
    """int32, -1 for a sample without a label."""


@dataclass(frozen=True, eq=False)
class LabelBlock:
    """Labels of consecutive rows of a shard, bad ones included."""

    samples: ShardSamples
    start: int
    labels: Array


@dataclass
class Batch:
    """Up to B images, the rows that they belong to, and what was read of other rows on the way.

    A row's labels come with the first batch that holds a row of its block, or earlier.
    """

    images: list[Array] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    bad: list[tuple[ShardSamples, int, str]] = field(default_factory=list)
    opened: list[ShardSamples] = field(default_factory=list)
    label_blocks: list[LabelBlock] = field(default_factory=list)

    @property
    def labels(self) -> Array:
        """int32 (B,), -1 for a sample without a label."""
        return np.concatenate([segment.labels for segment in self.segments]).astype(np.int32)


class Reader:
    """Iterates over batches; the thread that reads starts with the iteration and ends with it."""

    def __init__(
        self,
        plan: Plan,
        *,
        positions: HandOut,
        depth: int,
    ) -> None:
        """
        Args:
            plan: the run's plan.
            positions: places in `plan.shards` to score, taken one at a time.
            depth: how many batches may wait.
        """
        self._plan = plan
        self._positions = positions
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._cache = Cache(plan.options.cache_dir, size=plan.options.cache_size)
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

    def __iter__(self) -> Iterator[Batch]:
        self._thread.start()
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread, whatever it waits for."""
        self._stopped.set()
        self._cache.stop()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)  # for whoever waits in another thread

    def _run(self) -> None:
        try:
            self._fill(self._put)
            self._put(None)
        except Abandoned:
            return
        except BaseException as error:
            with contextlib.suppress(Abandoned):
                self._put(error)

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
        raise Abandoned

    def _fill(self, put: Callable[[Batch], None]) -> None:
        size = self._plan.choices.batch_size
        rule = self._plan.label_rule()
        batch = Batch()
        with contextlib.closing(self._fetched()) as fetched:
            for position, shard, file in fetched:
                with OpenShard(
                    shard, image_key=self._plan.options.image_key, labels=rule, file=file, cache=self._cache
                ) as opened:
                    num_rows = self._plan.num_rows(position, opened.num_samples)
                    samples = ShardSamples(
                        shard, opened.keys[:num_rows], opened.num_bytes, opened.fault, tuple(opened.notes)
                    )
                    batch.opened.append(samples)
                    for start in range(0, num_rows, size):
                        block = opened.read(start, min(start + size, num_rows))
                        batch = self._add(block, start, samples, batch, size, put)
                        # Samples that are bad before they are decoded fill no batch; they must be judged all the same.
                        if len(batch.bad) >= size:
                            put(batch)
                            batch = Batch()
                if len(batch.opened) >= MOST_OPENED:
                    put(batch)
                    batch = Batch()
        if batch.images or batch.bad or batch.opened:
            put(batch)

    def _fetched(self) -> Generator[tuple[int, Shard, ShardFile | None], None, None]:
        """The shards of the hand-out, with their files where they had to be brought here."""
        items = ((position, self._plan.shards[position]) for position in self._positions)
        return fetch_ahead(items, self._cache, may_draw=self._positions.has_more_for_all)

    def _add(
        self,
        block: SampleBlock,
        start: int,
        samples: ShardSamples,
        batch: Batch,
        size: int,
        put: Callable[[Batch], None],
    ) -> Batch:
        """Add a block's samples; hands on every batch that is full and returns the one being filled."""
        labels = np.asarray(block.labels, np.int32)
        batch.label_blocks.append(LabelBlock(samples, start, labels))
        good: list[int] = []
        for index, reason in enumerate(block.reasons):
            if reason is None:
                good.append(index)
            else:
                batch.bad.append((samples, start + index, reason))
        while good:
            taken, good = good[: size - len(batch.images)], good[size - len(batch.images) :]
            images = (block.images[index] for index in taken)
            batch.images.extend(image for image in images if image is not None)
            batch.segments.append(Segment(samples, np.array(taken) + start, labels[taken]))
            if len(batch.images) == size:
                put(batch)
                batch = Batch()
        return batch
