"""Consoles, and text that fits them: cut names, sizes, durations."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

NARROW = 80


def make_console(*, is_error: bool = False) -> Console:
    """Return a console as wide as the terminal, or 80 columns wide if the output is piped.

    It looks up its stream on every write, because the decoder replaces `sys.stderr` while it works.
    """
    from rich.console import Console

    stream = sys.stderr if is_error else sys.stdout
    return Console(
        stderr=is_error, width=None if stream.isatty() else NARROW, highlight=False, markup=False, emoji=False
    )


def cut(text: str, room: int) -> str:
    """Return `text`, shortened with an ellipsis if it is longer than `room`."""
    return text if len(text) <= room else text[: max(room - 1, 0)] + "…"


def size_text(num_bytes: float) -> str:
    """Return bytes in the unit that leaves one to three digits: `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def duration_text(seconds: float | None) -> str:
    """Return a duration as `1:05` or `2:00:00`, and None as `unknown`."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
