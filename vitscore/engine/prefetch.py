"""Shards to decoded batches: the reader and the decoder behind it, with as many batches under way as it takes.

First half of the loop; the second is the engine. It needs to know which pixels the models want and nothing else of
them, so that `Ahead` has it read and decode the first batches on a core that stands idle while the models are loaded.
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
from vitscore.engine.stage_times import Waits

if TYPE_CHECKING:
    from vitscore.plan.choices import Execution
    from vitscore.plan.plan import Plan
    from vitscore.ranks.shard_queue import HandOut

_READ_AHEAD = 2
"""Batches that wait to be decoded."""


class Intake:
    """Gives the batches of the shards that the hand-out gives, in order, decoded.

    Args:
        plan: the run's plan.
        geometries: the distinct ones of the plan's models.
        positions: places in `plan.shards`.
        execution: where this rank computes.

    Raises:
        SetupError: the decoder cannot be used.
    """

    def __init__(
        self,
        plan: Plan,
        geometries: Sequence[AnyGeometry],
        *,
        positions: HandOut,
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

    def fill(self, waits: Waits) -> None:
        """Have as many batches decoded as can be under way; returns once they are, or there are no more."""
        while not self._is_exhausted and len(self._under_way) < self._decoder.depth:
            with waits.on("read"):
                batch = next(self._batches, None)
            if batch is None:
                self._is_exhausted = True
                return
            if batch.images:
                self._decoder.submit(batch.images)
            self._under_way.append(batch)

    def take(self, waits: Waits) -> tuple[Batch, Decoded | None] | None:
        """The next batch and its pixels (None where it has no image); None behind the last.

        Raises:
            VitscoreError: what the reader met.
        """
        self.fill(waits)
        if not self._under_way:
            return None
        batch = self._under_way.popleft()
        if not batch.images:
            return batch, None
        with waits.on("decode"):
            return batch, self._decoder.collect()

    @property
    def decoded_again(self) -> DecodedAgain:
        """How often the decoder had to decode something again."""
        return self._decoder.again

    def stop_reading(self) -> None:
        """No batch comes any more, and nobody waits for one."""
        self._reader.close()

    def close(self) -> None:
        """Stop, and drop what was not taken."""
        self._reader.close()
        self._decoder.close()


class Ahead:
    """An intake that is made and filled in a thread of its own, until somebody takes it; whoever does closes it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._made: Future[Intake] | None = None
        self._filled: Future[None] | None = None

    def start(self, make: Callable[[], Intake]) -> None:
        """Begin; what goes wrong is told when the intake is taken."""
        self._made = made = self._pool.submit(make)
        self._filled = self._pool.submit(lambda: made.result().fill(Waits()))
        self._pool.submit(warm_up_kernels)

    def take(self) -> Intake | None:
        """The intake with its first batches under way; None where none was started.

        Raises:
            VitscoreError: it could not be made or filled.
        """
        if self._made is None or self._filled is None:
            return None
        self._filled.result()
        intake, self._made = self._made.result(), None
        return intake

    def close(self) -> None:
        """End the thread, and the intake that nobody took."""
        with contextlib.suppress(Exception):
            if self._made is not None and not self._made.cancel():
                intake = self._made.result()
                intake.stop_reading()  # the thread may be waiting for a server
                self._pool.shutdown(wait=True, cancel_futures=True)
                intake.close()
        self._pool.shutdown(wait=True, cancel_futures=True)


def warm_up_kernels() -> None:
    """Have numba make itself ready, which takes a quarter of a second, by the kernel that every run needs."""
    kernels.score_rows(np.zeros((1, 2), np.float32), np.zeros(1, np.int32), 1)
