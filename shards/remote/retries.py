"""What may go wrong with a request to a store, and the tries that are made before it counts.

Below everything remote. A `Failure` says whether another try may help; `retry` makes the tries. It knows no store.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

TRIES = 8
BACKOFF_S = 0.5
"""The longest first pause; each next one may be twice as long, up to `LONGEST_PAUSE_S`."""
LONGEST_PAUSE_S = 30.0
GONE = (404, 410)
FINAL = (401, 403, *GONE)

T = TypeVar("T")


class Failure(Exception):
    """A request that failed: its text is fit to be told.

    Args:
        text: what happened, without secrets.
        is_final: no other try can help.
        is_gone: the store says that there is no such thing.
    """

    def __init__(self, text: str, *, is_final: bool = False, is_gone: bool = False) -> None:
        super().__init__(text)
        self.is_final = is_final
        self.is_gone = is_gone


class Abandoned(Exception):
    """Nobody waits for the answer any more."""


def failed_status(status: int) -> Failure:
    """The failure that an HTTP status means."""
    reason = HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else ""
    return Failure(f"{status} {reason}".strip(), is_final=status in FINAL, is_gone=status in GONE)


def pause_s(attempt: int) -> float:
    """How long to wait after the `attempt`-th failure: exponential, full jitter."""
    return random.uniform(0, min(LONGEST_PAUSE_S, BACKOFF_S * 2.0**attempt))


def retry(call: Callable[[], T], *, stop: threading.Event | None = None) -> T:
    """Call until it does not fail for a passing reason, at most `TRIES` times.

    Raises:
        Failure: the last one.
        Abandoned: `stop` was set between two tries.
    """
    stop = stop or threading.Event()
    for attempt in range(TRIES):
        try:
            return call()
        except Failure as failure:
            if failure.is_final:
                raise
            if attempt == TRIES - 1:
                raise Failure(f"{failure}, {TRIES} tries") from None
        if stop.wait(pause_s(attempt)):
            raise Abandoned
    raise AssertionError("unreachable")
