"""Do two ranks on two cores go as fast as one process with two threads?

Question: what part of the images/s of one process do two ranks under torchrun reach, on the same cores and shards; and
          how long does the rank that finishes first stand idle at the end?
Expected: at least 0.9, and an idle end shorter than the last shard that was drawn takes.
Command:  vitscore bench ranks
Method:   ViT-Tiny/16 (random weights) on 2,000 ImageNet-like JPEGs on the CPU, in 24 shards of 10 to 162 images; both
          ways in turn over three rounds. The loop's seconds run from the first rank's beginning to the last one's end,
          as run.json has them by rank: a rank that begins late, or waits at the end, costs what it costs.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vitscore.bench.harness.checkpoints import CLASSES, make_checkpoint
from vitscore.bench.harness.corpus import photos, write
from vitscore.bench.harness.runs import OwnRun, run_own
from vitscore.bench.harness.timing import figure, ratio, rounds_in_turn, show
from vitscore.bench.whole import brief, rates

ROUNDS, NUM_RANKS, TARGET = 3, 2, 0.9
SIZES = tuple(10 + (number * 89) % 157 for number in range(24))
"""Images a shard."""
ALONE, SHARED = "one process", f"{NUM_RANKS} ranks"


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Rates of both ways, their ratio, and the idle end.

    Args:
        quick: 6 shards and one round, to see that everything works.
    """
    sizes, rounds = (SIZES[:6], 1) if quick else (SIZES, ROUNDS)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS))
    with tempfile.TemporaryDirectory() as name:
        shards, checkpoint = Path(name) / "shards", Path(name) / "vit-tiny"
        write_unequal(shards, sizes)
        make_checkpoint(checkpoint, kind="vit-tiny")
        start = partial(run_own, shards, [checkpoint], Path(name) / "out", "--device", "cpu")
        ways: dict[str, Callable[[], OwnRun]] = {ALONE: start, SHARED: partial(start, launcher=torchrun)}
        found = rounds_in_turn(ways, rounds)
    result: dict[str, Any] = {way: rates(runs, runs[-1].settings) for way, runs in found.items()}
    loops = [run.session["loop_s_by_rank"] for run in found[SHARED]]
    return {
        "images": sum(sizes),
        "shards": len(sizes),
        **result,
        "ratio": ratio(result[SHARED]["loop_images_per_s"], result[ALONE]["loop_images_per_s"]),
        "idle_s": figure([spread([ended for _, ended in by_rank]) for by_rank in loops], "s"),
        "late_s": figure([spread([began for began, _ in by_rank]) for by_rank in loops], "s"),
        "images_by_rank": [run.session["images_by_rank"] for run in found[SHARED]],
    }


def spread(times: Sequence[float]) -> float:
    return max(times) - min(times)


def write_unequal(folder: Path, sizes: Sequence[int]) -> None:
    """Shards of these numbers of images."""
    samples = photos(sum(sizes))
    for number, size in enumerate(sizes):
        part = folder / "parts" / str(number)
        (path,) = write(part, itertools.islice(samples, size), per_shard=size, classes=list(CLASSES))
        path.rename(folder / f"s-{number:05d}.tar")
    (part / "classes.txt").rename(folder / "classes.txt")


def table(result: dict[str, Any]) -> list[str]:
    """A way a line."""
    lines = [f"{'images/s':<14}{'start included':>24}{'loop':>24}"]
    for way in (ALONE, SHARED):
        each = result[way]
        lines.append(f"{way:<14}{brief(each['images_per_s']):>24}{brief(each['loop_images_per_s']):>24}")
    shares = ", ".join("/".join(map(str, each)) for each in result["images_by_rank"])
    return [
        *lines,
        f"{SHARED} / {ALONE}, loop: {show(result['ratio'], 2)}, target {TARGET}",
        f"the second rank begins after the first: {show(result['late_s'], 2)} s",
        f"the rank that ends first is idle for: {show(result['idle_s'], 2)} s",
        f"images by rank: {shares}",
    ]
