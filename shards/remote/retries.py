"""Failures of requests to stores, and the retries after them.

Used by all other modules of `remote`, and independent of the kind of store. A `Failure` records whether another attempt
may succeed; `retry` makes the attempts.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

TRIES = 8
BACKOFF_S = 0.5
"""Upper bound of the first pause; it doubles after every failure, up to `LONGEST_PAUSE_S`."""
LONGEST_PAUSE_S = 30.0
GONE = (404, 410)
FINAL = (401, 403, *GONE)

T = TypeVar("T")


class Failure(Exception):
    """A failed request, with a text that is safe to display.

    Args:
        text: the error, without secrets.
        is_final: whether further attempts are useless.
        is_gone: whether the store reported that the file does not exist.
    """

    def __init__(self, text: str, *, is_final: bool = False, is_gone: bool = False) -> None:
        super().__init__(text)
        self.is_final = is_final
        self.is_gone = is_gone


class Abandoned(Exception):
    """The result of a request is no longer needed."""


def failed_status(status: int) -> Failure:
    """Return the failure for an HTTP status."""
    reason = HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else ""
    return Failure(f"{status} {reason}".strip(), is_final=status in FINAL, is_gone=status in GONE)


def pause_s(attempt: int) -> float:
    """Return the pause after a failure, with exponential backoff and full jitter; the first attempt is 0."""
    return random.uniform(0, min(LONGEST_PAUSE_S, BACKOFF_S * 2.0**attempt))


def retry(call: Callable[[], T], *, stop: threading.Event | None = None) -> T:
    """Call a function until it succeeds or fails for good, at most `TRIES` times.

    Raises:
        Failure: the last failure.
        Abandoned: `stop` was set between two attempts.
    """
    stop = stop or threading.Event()
    for attempt in range(TRIES):
        try:
            return call()
        except Failure as failure:
            if failure.is_final:
                raise
            if attempt == TRIES - 1:
                raise Failure(f"{failure}, after {TRIES} tries") from None
        if stop.wait(pause_s(attempt)):
            raise Abandoned
    raise AssertionError("unreachable")
