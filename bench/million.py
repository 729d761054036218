"""A million images on one machine: throughput, memory, start-up, and a kill at half.

Question: with both demo models and 8 x 8 PNGs, 5,000 a shard, from 50,000 images to 1,000,000: does the rate hold, does
memory grow, does start-up, and how long does a run that was killed at half take until it scores again?
Expected: the rate within 5%; peak memory within 10%; until the first new sample under 1 s more than a fresh start takes
(100 footers to read); the end (fold of a million rows) under 10 s.
Command:  vitscore bench million      (half an hour; not among those that run by default)
Method:   every run in a separate process. "first image" is when the first new part appeared, less the time that a
          part takes at the run's rate; "end" is from the last part to the end of the process. Memory is the peak that
          the system counted for the process (VmHWM), read while it ran.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from vitscore.bench.harness.corpus import digits, write
from vitscore.bench.memory import NAMES

SMALL, LARGE, PER_SHARD = 50_000, 1_000_000, 5_000
QUICK = (2_000, 8_000, 500)


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Rates, peaks and times of both sizes."""
    small, large, per_shard = QUICK if quick else (SMALL, LARGE, PER_SHARD)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        result: dict[str, Any] = {"small": small, "large": large, "per_shard": per_shard}
        for size in (small, large):
            started = time.perf_counter()
            write(root / str(size), digits(size), per_shard=per_shard, classes=NAMES)
            result[f"make_{size}_s"] = time.perf_counter() - started
            result[f"dry_run_{size}_s"] = wall_s([*command(root / str(size), root / "none"), "--dry-run"])
        watched = partial(watch, per_shard=per_shard)
        result["small run"] = watched(command(root / str(small), root / "small"), root / "small", small, kill_at=None)
        run = command(root / str(large), root / "large")
        result["until half"] = watched(run, root / "large", large, kill_at=large // per_shard // 2)
        result["from half"] = watched(run, root / "large", large, kill_at=None)
        result["fold_s"] = wall_s([sys.executable, "-m", "vitscore", "metrics", str(root / "large")])
        result["check_s"] = wall_s([sys.executable, "-m", "vitscore", "metrics", str(root / "large"), "--check"])
        result["ledger"] = json.loads((root / "large" / "metrics.json").read_bytes())["ledger"]
        parts = list((root / "large" / "parts").iterdir())
        result["parts_bytes"] = sum(part.stat().st_size for part in parts)
    return result


def command(shards: Path, output: Path) -> list[str]:
    models = ["-m", "demo-vit", "-m", "demo-clip"]
    return [sys.executable, "-m", "vitscore", "run", str(shards), *models, "-o", str(output)]


def wall_s(words: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def watch(words: list[str], out: Path, size: int, *, per_shard: int, kill_at: int | None) -> dict[str, Any]:
    """Run to the end, or until there are `kill_at` parts; peak memory, and when each part appeared."""
    before = num_parts(out)
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    peak, appeared, count = 0, [], before
    while process.poll() is None:
        peak = max(peak, peak_rss_bytes(process.pid))
        if (now := num_parts(out)) > count:
            appeared += [time.perf_counter() - started] * (now - count)
            count = now
        if kill_at is not None and count >= kill_at:
            process.kill()
        time.sleep(0.02)
    ended = time.perf_counter() - started
    assert process.returncode == 0 or kill_at is not None, process.returncode
    part_s = (appeared[-1] - appeared[0]) / (len(appeared) - 1)
    return {
        "images": (count - before) * per_shard,
        "images_per_s": per_shard / part_s,
        "peak_rss_bytes": peak,
        "first_image_s": appeared[0] - part_s,
        "last_part_to_end_s": ended - appeared[-1],
        "seconds": ended,
        "of": size,
    }


def num_parts(out: Path) -> int:
    return len(list((out / "parts").glob("*.parquet")))


def peak_rss_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0")
    return int(line.split()[1]) * 1024


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'':<24}{'images':>10}{'images/s':>10}{'peak RSS':>10}{'first image':>13}{'end':>8}"]
    for what in ("small run", "until half", "from half"):
        figures = result[what]
        lines.append(
            f"{what:<24}{figures['images']:>10,}{figures['images_per_s']:>10,.0f}"
            f"{figures['peak_rss_bytes'] / 1e6:>7,.0f} MB{figures['first_image_s']:>11.1f} s"
            f"{figures['last_part_to_end_s']:>6.1f} s"
        )
    small, large = result["small"], result["large"]
    return [
        *lines,
        *(f"--dry-run of {size:,}: {result[f'dry_run_{size}_s']:.1f} s" for size in (small, large)),
        f"fold again: {result['fold_s']:.1f} s; --check: {result['check_s']:.1f} s",
        f"parts: {result['parts_bytes'] / 1e6:,.0f} MB",
    ]
