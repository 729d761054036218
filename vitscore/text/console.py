"""Consoles, and numbers and text cut for them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    pass

NARROW = 80


def make_console(*, is_error: bool = False) -> Console:
    """A console as wide as the terminal, or 80 columns where the output is piped.

    It looks its stream up each time it writes: the decoder changes `sys.stderr` while it is at work.
    """
    stream = sys.stderr if is_error else sys.stdout
    return Console(
        stderr=is_error, width=None if stream.isatty() else NARROW, highlight=False, markup=False, emoji=False
    )


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a percentage; an undefined one as a dash."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def cut(text: str, room: int) -> str:
    """`text`, its end left out where it is longer than `room`."""
    return text if len(text) <= room else text[: room - 1] + "…"


def size_text(num_bytes: float) -> str:
    """Bytes in the unit that leaves one to three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def duration_text(seconds: float | None) -> str:
    """`1:05`, `2:00:00`; unknown where it is None."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
