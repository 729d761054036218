"""Shards to decoded batches: the reader and the decoder, with as many batches in flight as the decoder holds.

This is the first half of the loop; the engine is the second. `Intake` depends on the models' input geometries only, not
on their weights, so `Prefetch` can run it in a thread and have the first batches decoded while the models are loading.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from vitscore import kernels
from vitscore.decode.counts import DecodedAgain
from vitscore.decode.make import make_decoder
from vitscore.decode.pixels import AnyGeometry, Decoded
from vitscore.engine.reader import Batch, Reader
from vitscore.engine.stage_times import StageTimes

if TYPE_CHECKING:
    from vitscore.plan.choices import Execution
    from vitscore.plan.plan import Plan
    from vitscore.ranks.shard_queue import ShardQueue

_READ_AHEAD = 2
"""Batches that the reader keeps ready for the decoder."""


class Intake:
    """Reads and decodes the shards that this rank takes from the queue, batch by batch, in order.

    Args:
        plan: the run's plan.
        geometries: the distinct geometries of the plan's models.
        positions: positions in `plan.shards` for this rank to score.
        execution: the device and threads of this rank.

    Raises:
        SetupError: the decoder cannot be used.
    """

    def __init__(
        self,
        plan: Plan,
        geometries: Sequence[AnyGeometry],
        *,
        positions: ShardQueue,
        execution: Execution,
    ) -> None:
        self.geometries = list(geometries)
        self._reader = Reader(plan, positions=positions, depth=_READ_AHEAD)
        self._decoder = make_decoder(
            plan.choices.decoder,
            geometries,
            batch_size=plan.choices.batch_size,
            num_threads=execution.decode_threads,
            device_id=execution.device_id,
            max_pixels=plan.options.max_pixels,
        )
        self._batches = iter(self._reader)
        self._under_way: deque[Batch] = deque()
        self._is_exhausted = False

    def fill(self, times: StageTimes) -> None:
        """Submit batches to the decoder until it is full or the shards are exhausted."""
        while not self._is_exhausted and len(self._under_way) < self._decoder.depth:
            with times.on("read"):
                batch = next(self._batches, None)
            if batch is None:
                self._is_exhausted = True
                return
            if batch.images:
                self._decoder.submit(batch.images)
            self._under_way.append(batch)

    def take(self, times: StageTimes) -> tuple[Batch, Decoded | None] | None:
        """Return the next batch and its pixels; None after the last batch.

        The pixels are None if the batch has no images.

        Raises:
            VitscoreError: the reader failed.
        """
        self.fill(times)
        if not self._under_way:
            return None
        batch = self._under_way.popleft()
        if not batch.images:
            return batch, None
        with times.on("decode"):
            return batch, self._decoder.collect()

    @property
    def decoded_again(self) -> DecodedAgain:
        """How often the decoder had to decode a batch or an image again."""
        return self._decoder.again

    def stop_reading(self) -> None:
        """Stop reading and release any waiter."""
        self._reader.close()

    def close(self) -> None:
        """Stop reading and decoding, and drop the remaining batches."""
        self._reader.close()
        self._decoder.close()


class Prefetch:
    """Creates and fills an intake in a background thread. The caller of `take` owns and closes it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._made: Future[Intake] | None = None
        self._filled: Future[None] | None = None

    def start(self, make: Callable[[], Intake]) -> None:
        """Create the intake in the background; `take` raises any error."""
        self._made = made = self._pool.submit(make)
        self._filled = self._pool.submit(lambda: made.result().fill(StageTimes()))
        self._pool.submit(warm_up_kernels)

    def take(self) -> Intake | None:
        """Return the intake with its first batches in flight; None if `start` was not called.

        Raises:
            VitscoreError: the intake could not be created or filled.
        """
        if self._made is None or self._filled is None:
            return None
        self._filled.result()
        intake, self._made = self._made.result(), None
        return intake

    def close(self) -> None:
        """End the thread, and close an intake that was not taken."""
        with contextlib.suppress(Exception):
            if self._made is not None and not self._made.cancel():
                intake = self._made.result()
                intake.stop_reading()  # the thread may be blocked on a server
                self._pool.shutdown(wait=True, cancel_futures=True)
                intake.close()
        self._pool.shutdown(wait=True, cancel_futures=True)


def warm_up_kernels() -> None:
    """Call the row kernel once: numba takes a quarter of a second to load its first kernel."""
    kernels.score_rows(np.zeros((1, 2), np.float32), np.zeros(1, np.int32), 1)
