"""Status of a run, read only from its folder, during the run or afterwards.

The parts show how much is done, and their modification times the rate; run.json names the process of the last start and
shows whether that start has ended. The scoring processes are not contacted, so reading the status does not slow them.
"""

from __future__ import annotations

import time
from calendar import timegm
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitscore.decode.counts import DecodedAgain, total
from vitscore.rundir.folder import require_record
from vitscore.rundir.parts import finished_parts
from vitscore.system.durable import host_name, is_alive


@dataclass(frozen=True)
class Status:
    """Counts of shards and samples, and the rate of the last start."""

    state: str
    """`finished`, `running`, `stopped`, or `unknown` if the last start was on another machine."""
    shards_done: int
    shards_total: int
    samples: int
    bad: int
    bad_shards: dict[str, str]
    starts: int
    last_started: str | None
    last_part_s: float | None
    """Seconds since the last part was finished."""
    images_per_s: float | None
    """Rate of the last start: its own measurement, or an estimate from its parts' times if it runs or was killed."""
    seconds_left: float | None
    decoded_again: DecodedAgain = field(default_factory=DecodedAgain)
    """Counts of the starts that have ended."""


def read_status(folder: Path) -> Status:
    """Read a run's status from run.json, the parts' footers and their modification times.

    Raises:
        UsageError: `folder` holds no run.
    """
    record = require_record(folder)
    parts = finished_parts(folder / "parts", record["identity_hash"])
    footers = [footer for _, footer in parts.values()]
    last: Mapping[str, Any] = record["sessions"][-1] if record["sessions"] else {}
    finished_at = sorted((path.stat().st_mtime, footer.expected) for path, footer in parts.values())
    state = find_state(last, is_complete=len(parts) == record["corpus"]["shards"])
    rate = last.get("images_per_s") or rate_by_times(finished_at, started=last.get("started"))
    shards_left = record["corpus"]["shards"] - len(parts)
    samples = sum(footer.expected for footer in footers)
    is_timed = state == "running" and rate and parts
    return Status(
        state=state,
        shards_done=len(parts),
        shards_total=record["corpus"]["shards"],
        samples=samples,
        bad=sum(footer.bad for footer in footers),
        bad_shards={footer.shard: footer.fault for footer in footers if footer.fault},
        starts=len(record["sessions"]),
        last_started=last.get("started"),
        last_part_s=max(0.0, time.time() - finished_at[-1][0]) if finished_at else None,
        images_per_s=rate,
        seconds_left=shards_left * samples / len(parts) / rate if is_timed and rate else None,
        decoded_again=total(session.get("decoded_again", {}) for session in record["sessions"]),
    )


def find_state(last: Mapping[str, Any], *, is_complete: bool) -> str:
    """Return the state of the last start."""
    if last.get("host") == host_name() and "ended" not in last:
        if is_alive(last["process"], started=last["process_start"]):
            return "running"
    if is_complete:
        return "finished"
    return "unknown" if last.get("host") != host_name() and "ended" not in last else "stopped"


def rate_by_times(finished_at: list[tuple[float, int]], *, started: str | None) -> float | None:
    """Return the samples per second between the first and the last part of the last start; None below two parts.

    Args:
        finished_at: time and samples of every part, ascending.
        started: when the last start began, in UTC.
    """
    if started is None:
        return None
    began = timegm(time.strptime(started, "%Y-%m-%dT%H:%M:%SZ"))
    recent = [(when, samples) for when, samples in finished_at if when >= began]
    if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
        return None
    return sum(samples for _, samples in recent[1:]) / (recent[-1][0] - recent[0][0])


def status_lines(status: Status) -> list[str]:
    """Return the lines that `vitscore status` prints."""
    left = status.shards_total - status.shards_done
    starts = f", {status.starts} starts" if status.starts > 1 else ""
    lines = [
        f"state    {status.state}{f', last started {status.last_started}' if status.last_started else ''}{starts}",
        f"shards   {status.shards_done:,} of {status.shards_total:,} done, {left:,} left",
        f"samples  {status.samples:,} in finished shards, {status.bad:,} bad",
    ]
    if status.images_per_s:
        left_text = f", about {duration(status.seconds_left)} left" if status.seconds_left else ""
        lines.append(f"rate     {status.images_per_s:,.0f} images/s in the last start{left_text}")
    if status.last_part_s is not None and status.state == "running":
        lines.append(f"last     part finished {duration(status.last_part_s)} ago")
    if said := status.decoded_again.sentence():
        lines.append(f"decoder  {said}")
    lines.extend(f"bad      {shard}: {reason}" for shard, reason in status.bad_shards.items())
    if status.state == "stopped":
        lines.append("Run the command that started it again to resume from the finished parts.")
    return lines


def duration(seconds: float) -> str:
    """Format a duration: `42 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
