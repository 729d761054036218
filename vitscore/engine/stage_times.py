"""What the loop waits for: the seconds that its own thread stood still, by stage, and those of its own work.

A clock is read twice a batch and stage, and nothing else; the stages themselves are not touched. `count` is the loop's
own work: rows into parts, and counting. What is left of the loop's time is between the stages. On a GPU the loop does
not wait for the device to decode, its stream does; the loop meets that time where it waits for the forward behind it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

STAGES = ("read", "decode", "forward", "count", "write")


class Waits:
    """Seconds by stage; a stage inside another's time counts for itself alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._counted = 0.0

    @contextlib.contextmanager
    def on(self, stage: str) -> Iterator[None]:
        """Count what happens inside as waiting for a stage."""
        counted, started = self._counted, time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - started
            self.seconds[stage] += taken - (self._counted - counted)
            self._counted = counted + taken
