"""What the loop waits for: the seconds that its own thread stood still, by stage.

A clock is read twice a batch and stage, and nothing else; the stages themselves are not touched. What is left of the
loop's time is its own work: rows into parts, and counting. On a GPU the loop does not wait for the device to decode,
its stream does; the loop meets that time where it waits for the forward behind it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

STAGES = {"read": "shards", "decode": "decoding", "forward": "the forward", "write": "parts to be written"}


class Waits:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def on(self, stage: str) -> Iterator[None]:
        """Count what happens inside as waiting for a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


def bottleneck(waiting_s: Mapping[str, float], seconds: float) -> tuple[str, float] | None:
    """The stage that the loop waited for longest, and its share of the loop's time; None where there was no loop."""
    if not waiting_s or seconds <= 0:
        return None
    stage = max(waiting_s, key=lambda name: waiting_s[name])
    return stage, min(1.0, waiting_s[stage] / seconds)
