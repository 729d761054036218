"""Handle Ctrl-C and SIGTERM: an orderly end within seconds, or a forced one if that takes too long.

The first signal raises an exception in the main thread, so that every caller cleans up. Later signals are ignored,
because launchers send several. A separate thread notices the signal even while the main thread runs native code, and
ends the process after `GRACE_S`. That may leave a temporary file, which the next start sweeps.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

GRACE_S = 10.0


class Stopped(BaseException):
    """A signal to stop, raised as an exception that no handler of ordinary errors catches."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


@contextlib.contextmanager
def stopping_on_signals(report: Callable[[], None]) -> Iterator[None]:
    """Raise Stopped on SIGINT and SIGTERM, and restore the old handlers afterwards.

    Args:
        report: called before the process is ended by force.
    """
    is_stopping = False

    def stop(signal_number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            raise Stopped(signal_number)

    heard, wakes = socket.socketpair()
    wakes.setblocking(False)
    old_wakeup = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    is_over = threading.Event()
    watch = threading.Thread(target=_watch, args=(heard, is_over, set(before), report), name="signals", daemon=True)
    watch.start()
    try:
        yield
    finally:
        is_over.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_wakeup)
        wakes.close()  # ends the thread
        watch.join()
        heard.close()


def _watch(heard: socket.socket, is_over: threading.Event, numbers: set[int], report: Callable[[], None]) -> None:
    """Wait for a signal, then for the orderly end; end the process if that does not come in time."""
    while received := heard.recv(64):
        number = next((number for number in received if number in numbers), None)
        if number is None:
            continue
        if not is_over.wait(GRACE_S):
            report()
            os._exit(128 + number)
        return
