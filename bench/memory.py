"""Does memory grow with the corpus?

Question: how much larger is the peak resident memory of a whole run over 20,000 small images than over 2,000?
Expected: under 10%; batches, prefetch and one shard's rows are all that is held.
Command:  python -m vitscore.bench memory
Method:   digits of 8 x 8 pixels, 500 a shard, both demo models, each run in a process of its own, peak by getrusage.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vitscore.bench.corpus import digits, write

SIZES = (2_000, 20_000)
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def measure(sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Peak RSS and rate by number of images, and the ratio of the last peak to the first."""
    peaks: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for size in sizes:
            folder = Path(name) / str(size)
            write(folder / "shards", digits(size), per_shard=500, classes=NAMES)
            session = score(folder / "shards", folder / "out", models=["demo-vit", "demo-clip"])
            peaks[str(size)] = {
                "peak_rss_bytes": session["peak_rss_bytes"],
                "images_per_s": session["images_per_s"],
            }
    ratio = peaks[str(sizes[-1])]["peak_rss_bytes"] / peaks[str(sizes[0])]["peak_rss_bytes"]
    return {"images": peaks, "ratio": ratio}


def score(shards: Path, output: Path, *, models: list[str]) -> dict[str, Any]:
    """One whole run in its own process; returns its session's record."""
    named = [word for model in models for word in ("-m", model)]
    command = [sys.executable, "-m", "vitscore", "run", str(shards), *named, "-o", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    session: dict[str, Any] = json.loads((output / "run.json").read_bytes())["sessions"][-1]
    return session


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'images':>10}  {'peak RSS':>10}  {'images/s':>10}"]
    for size, figures in result["images"].items():
        peak = f"{figures['peak_rss_bytes'] / 1e6:,.0f} MB"
        lines.append(f"{int(size):>10,}  {peak:>10}  {figures['images_per_s']:>10,.0f}")
    return [*lines, f"ratio of the peaks: {result['ratio']:.3f}"]
