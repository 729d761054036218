"""Shards to batches: take shards from the queue, read their samples, fill batches across shard borders.

The reader runs in a thread, a bounded number of batches ahead of the decoder. Shards that must be fetched or unpacked
are fetched ahead of the reader (see `shards.remote.cache`). A sample that is bad before decoding (no image, a wrong
label) takes no place among a batch's images; the batch carries its row and reason separately. The reader does not open
parts; the engine does.
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
from vitscore.ranks.shard_queue import ShardQueue
from vitscore.shards.files import ShardFile
from vitscore.shards.remote.cache import Cache, fetch_ahead
from vitscore.shards.remote.retries import Abandoned
from vitscore.shards.samples import OpenShard, SampleBlock
from vitscore.shards.shard import Shard

Array = np.ndarray[Any, Any]
MOST_OPENED = 64
"""Most shards that one batch may open. The limit bounds a batch if many shards are empty."""


@dataclass(frozen=True, eq=False)
class ShardSamples:
    """A shard as it was read: the keys of the samples to score, and its faults."""

    shard: Shard
    keys: Sequence[str]
    num_bytes: int | None
    fault: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive images of a batch that come from one shard."""

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
    """Up to B images with their rows, and the bad rows, labels and shards that were read with them.

    A block's labels come with the first batch that holds a row of the block, or earlier.
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
    """Iterates over batches; the reading thread starts and ends with the iteration."""

    def __init__(
        self,
        plan: Plan,
        *,
        positions: ShardQueue,
        depth: int,
    ) -> None:
        """
        Args:
            plan: the run's plan.
            positions: positions in `plan.shards` to score, taken one at a time.
            depth: how many batches may wait for the decoder.
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
        """Stop the thread, even if it is blocked on the queue or on a server."""
        self._stopped.set()
        self._cache.stop()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)  # releases a consumer in another thread

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
                        # Samples that are bad before decoding fill no batch, but --max-bad must still be judged.
                        if len(batch.bad) >= size:
                            put(batch)
                            batch = Batch()
                if len(batch.opened) >= MOST_OPENED:
                    put(batch)
                    batch = Batch()
        if batch.images or batch.bad or batch.opened:
            put(batch)

    def _fetched(self) -> Generator[tuple[int, Shard, ShardFile | None], None, None]:
        """Yield the shards from the queue, with their local files if they had to be fetched."""
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
        """Add a block's samples: put every full batch, and return the one being filled."""
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
