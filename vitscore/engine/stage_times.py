"""Time that the loop spends on each stage: waiting for it, or for `count` working on it.

Only the clock is read, twice for each batch and stage; the stages themselves are not instrumented. `count` is the
loop's own work: copying rows into parts and counting them. The rest of the loop's time passes between the stages.
On a GPU the stream waits for decoding, not the loop, so decode time appears in the wait for the forward.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

STAGES = ("read", "decode", "forward", "count", "write")


class StageTimes:
    """Seconds by stage. The time of a nested stage is not counted for the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._counted = 0.0

    @contextlib.contextmanager
    def on(self, stage: str) -> Iterator[None]:
        """Add the time spent in the `with` block to a stage."""
        counted, started = self._counted, time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - started
            self.seconds[stage] += taken - (self._counted - counted)
            self._counted = counted + taken
