"""The decoder's pool of threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class Threads:
    """A pool of `count` threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="decode")

    def submit(self, work: Callable[..., Result], *args: Any) -> Future[Result]:
        """Start `work(*args)` on one of the threads."""
        return self._pool.submit(work, *args)

    def share(self, work: Callable[[int], None]) -> None:
        """Call `work(0)` to `work(count - 1)` in parallel and wait for all of them; raises the first error."""
        for done in [self._pool.submit(work, worker) for worker in range(self.count)]:
            done.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
