"""How much memory does a run take, and does it grow with the corpus?

Question: how much larger is the peak resident memory of a whole run over 20,000 small images than over 2,000? What is
          the peak of ViT-Tiny/16 at 224 pixels over JPEGs of 105 KB, and what is it made of?
Expected: under 10% more, since batches, prefetch and one shard's rows are all that is held; under 1.5 GB, half of which
          is there once everything is imported.
Command:  vitscore bench memory
Method:   each run in a separate process, peak as the system counts it. Growth: digits of 8 x 8 pixels, 500 a shard,
          both demo models. ViT-Tiny/16: random weights, 1,000 images; then the same again without each of its parts in
          turn, and the imports alone, for the table of what takes what.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vitscore.bench.harness.checkpoints import CLASSES, make_checkpoint
from vitscore.bench.harness.corpus import digits, photos, write
from vitscore.bench.harness.timing import run_process
from vitscore.bench.stages.startup import IMPORTS, NOTHING

SIZES, QUICK_SIZES = (2_000, 20_000), (50, 100)
NUM_PHOTOS, QUICK_PHOTOS = 1_000, 8
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TARGET_BYTES = 1_500_000_000

VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "as it is": ([], {}),
    "one thread": (["-j", "1"], {"OMP_NUM_THREADS": "1"}),
    "fp32, so no audit of the precision": (["--precision", "fp32"], {}),
    "torchvision's decoder": (["--decoder", "torchvision"], {}),
    "as many heaps as glibc likes": ([], {"MALLOC_ARENA_MAX": "16"}),
}
"""Options and environment of the runs that tell what takes what."""


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Peaks by number of small images and their ratio; peaks of ViT-Tiny/16's runs; peaks of imports alone."""
    sizes = QUICK_SIZES if quick else SIZES
    with tempfile.TemporaryDirectory() as name:
        peaks = measure_growth(Path(name), sizes, models=["demo-vit"] if quick else ["demo-vit", "demo-clip"])
        photographs = write_photos(Path(name) / "photos", QUICK_PHOTOS if quick else NUM_PHOTOS)
        variants = {"as it is": VARIANTS["as it is"]} if quick else VARIANTS
        large = {
            what: peak_of_run(photographs, Path(name) / "vit-tiny", Path(name) / what, options, env)
            for what, (options, env) in variants.items()
        }
    return {
        "images": peaks,
        "ratio": peaks[str(sizes[-1])]["peak_rss_bytes"] / peaks[str(sizes[0])]["peak_rss_bytes"],
        "vit_tiny_peak_rss_bytes": large,
        "import_peak_rss_bytes": {
            what: run_process([sys.executable, "-c", code]).peak_rss_bytes
            for what, code in IMPORTS.items()
            if not quick or what == NOTHING
        },
    }


def measure_growth(root: Path, sizes: tuple[int, ...], *, models: list[str]) -> dict[str, dict[str, float]]:
    """Peak and rate by number of images."""
    peaks: dict[str, dict[str, float]] = {}
    for size in sizes:
        folder = root / str(size)
        write(folder / "shards", digits(size), per_shard=500, classes=NAMES)
        session = score(folder / "shards", folder / "out", models=models)
        peaks[str(size)] = {"peak_rss_bytes": session["peak_rss_bytes"], "images_per_s": session["images_per_s"]}
    return peaks


def write_photos(folder: Path, count: int) -> Path:
    write(folder, photos(count), per_shard=250, classes=[*CLASSES])
    return folder


def peak_of_run(shards: Path, checkpoint: Path, output: Path, options: list[str], env: dict[str, str]) -> int:
    """Peak of one whole run of ViT-Tiny/16, its end included; the checkpoint is made where there is none."""
    if not checkpoint.exists():
        make_checkpoint(checkpoint)
    command = [sys.executable, "-m", "vitscore", "run", str(shards), "-m", str(checkpoint), "-o", str(output)]
    return run_process([*command, *options], env=env).peak_rss_bytes


def score(shards: Path, output: Path, *, models: list[str]) -> dict[str, Any]:
    """One whole run in its own process; returns its session's record."""
    named = [word for model in models for word in ("-m", model)]
    command = [sys.executable, "-m", "vitscore", "run", str(shards), *named, "-o", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    session: dict[str, Any] = json.loads((output / "run.json").read_bytes())["sessions"][-1]
    return session


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'images, 8 x 8':<44}{'peak RSS':>12}{'images/s':>12}"]
    for size, figures in result["images"].items():
        lines.append(f"{int(size):<44,}{megabytes(figures['peak_rss_bytes']):>12}{figures['images_per_s']:>12,.0f}")
    lines += [f"ratio of the peaks: {result['ratio']:.3f}", f"ViT-Tiny/16 (target {megabytes(TARGET_BYTES)})"]
    lines += [f"  {what:<42}{megabytes(peak):>12}" for what, peak in result["vit_tiny_peak_rss_bytes"].items()]
    lines.append("imports alone")
    lines += [f"  {what:<42}{megabytes(peak):>12}" for what, peak in result["import_peak_rss_bytes"].items()]
    return lines


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"
