"""How far a run is, read from its folder alone, while it runs or after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitscore.folder import require_record
from vitscore.parts import finished_parts


@dataclass(frozen=True)
class Status:
    """Counts of shards and samples, and the rate of the last start that ended."""

    shards_done: int
    shards_total: int
    samples: int
    bad: int
    bad_shards: dict[str, str]
    images_per_s: float | None


def read_status(folder: Path) -> Status:
    """Read the record and the footers of the parts.

    Raises:
        UsageError: there is no run in `folder`.
    """
    record = require_record(folder)
    parts = finished_parts(folder / "parts", record["identity_hash"])
    footers = [footer for _, footer in parts.values()]
    sessions = record["sessions"]
    return Status(
        shards_done=len(parts),
        shards_total=record["corpus"]["shards"],
        samples=sum(footer.expected for footer in footers),
        bad=sum(footer.bad for footer in footers),
        bad_shards={footer.shard: footer.fault for footer in footers if footer.fault},
        images_per_s=sessions[-1]["images_per_s"] if sessions else None,
    )


def status_lines(status: Status) -> list[str]:
    left = status.shards_total - status.shards_done
    lines = [
        f"shards   {status.shards_done:,} of {status.shards_total:,} done, {left:,} left",
        f"samples  {status.samples:,} in finished shards, {status.bad:,} bad",
    ]
    if status.images_per_s:
        lines.append(f"rate     {status.images_per_s:,.0f} images/s at the last start that ended")
    lines.extend(f"bad      {shard}: {reason}" for shard, reason in status.bad_shards.items())
    return lines
