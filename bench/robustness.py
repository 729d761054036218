"""How much does a grid of operators and severities cost, against a run for each cell?

Question: how long is one `vitscore robustness` pass over N cells (and the unchanged images), as a ratio of the N + 1
runs that give the same predictions, `vitscore run --augment OP:severity=N`? Twice: the demo's two small models on
ImageNet-like JPEGs, where reading and decoding are most of a run, and ViT-Tiny/16, which is bound by its forward. And
how do the demo's models fare over all 14 operators and 5 severities, on the 500 held-out digits?
Expected: at most 0.5 where decoding dominates, and no more than 1 where the forward does.
Command:  vitscore bench robustness
Method:   seconds of the loops alone, as run.json has them: without the imports that N + 1 processes would each pay for.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from vitscore.bench.harness.checkpoints import make_checkpoint
from vitscore.bench.harness.corpus import photos, write
from vitscore.bench.memory import NAMES as DIGIT_NAMES

OPERATORS = ("contrast", "jpeg_compression", "occlusion", "gaussian_noise")
SEVERITIES = (1, 3, 5)
CELLS = tuple(f"{name}:severity={level}" for name in OPERATORS for level in SEVERITIES)


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Seconds of the grid and of the runs, and the demo's robustness."""
    num_small, num_large = (40, 10) if quick else (1_000, 60)
    result: dict[str, Any] = {"ratios": {}}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_checkpoint(root / "vit-tiny")
        for what, models, count in (
            ("bound by decoding: the demo's models", ["demo-vit", "demo-clip"], num_small),
            ("bound by the forward: ViT-Tiny/16", [str(root / "vit-tiny")], num_large),
        ):
            shards = root / f"shards-{count}"
            labels = DIGIT_NAMES if count == num_small else [f"class {number}" for number in range(10)]
            write(shards, photos(count), per_shard=250, classes=labels)
            loop_s(shards, models, root / f"warm-{count}")
            grid = loop_s(shards, models, root / f"grid-{count}", cells=CELLS)
            runs = [
                loop_s(shards, models, root / f"run-{count}-{number}", augment=augment)
                for number, augment in enumerate([(), *((cell,) for cell in CELLS)])
            ]
            figures = {"images": count, "cells": len(CELLS), "grid_s": grid, "runs_s": sum(runs), "one_run_s": runs[0]}
            result["ratios"][what] = {**figures, "ratio": grid / sum(runs)}
        result["digits"] = demo_robustness(root / "digits", limit=50 if quick else None)
    return result


def loop_s(shards: Path, models: list[str], out: Path, **options: Any) -> float:
    """Seconds that a run's loop takes."""
    from vitscore import score

    score(shards, models, out, progress=False, device="cpu", **options)
    seconds: float = json.loads((out / "run.json").read_bytes())["sessions"][-1]["seconds"]
    return seconds


def demo_robustness(out: Path, *, limit: int | None) -> dict[str, Any]:
    """robustness.json of the demo over the whole grid, and its images/s."""
    from vitscore import score
    from vitscore.robustness.grid import make_cells, refold

    score("demo", ["demo-vit", "demo-clip"], out, progress=False, cells=make_cells([], []), limit=limit)
    session = json.loads((out / "run.json").read_bytes())["sessions"][-1]
    return {"images_per_s": session["images_per_s"], "document": refold(out)}


def table(result: dict[str, Any]) -> list[str]:
    from vitscore.robustness.words import table as accuracy_table

    lines = []
    for what, figures in result["ratios"].items():
        lines.append(
            f"{what}, {figures['images']:,} images, {figures['cells']} cells: grid {figures['grid_s']:.1f} s, "
            f"runs {figures['runs_s']:.1f} s, ratio {figures['ratio']:.2f}"
        )
    digits = result["digits"]
    return [
        *lines,
        f"digits, 70 cells, two models: {digits['images_per_s']:.1f} images/s",
        *accuracy_table(digits["document"]),
    ]
