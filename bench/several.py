"""How much do two models cost in one run, against two runs?

Question: what part of the time of two runs does one run of both models take, (a) where decoding dominates and (b) where
          the forwards do; and in (b), how much more than one decode and both forwards, each measured alone?
Expected: at most 0.6 in (a); in (b) at most 1.05 times decode and forwards, and under 1 of the two runs.
Command:  vitscore bench several
Method:   (a) the demo's ViT and CLIP on 4,000 JPEGs of about 400 x 500 pixels and 110 KB, (b) ViT-Tiny/16 and a CLIP of
          the same size at 224 pixels on 800; random weights in (b). Both together, each by itself, and the bound, every
          one in a separate process, in turn over three rounds; seconds of the loops as run.json has them, and of the
          whole processes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vitscore.bench.harness.checkpoints import CLASSES, make_checkpoint
from vitscore.bench.harness.corpus import photos, write
from vitscore.bench.harness.runs import run_own
from vitscore.bench.harness.timing import Figure, figure, ratio, rounds_in_turn, show
from vitscore.bench.memory import NAMES as DIGIT_NAMES
from vitscore.bench.peers.bound import measure_bound

ROUNDS = 3
DECODING, FORWARDS = "decoding dominates", "forwards dominate"
NUM_IMAGES = {DECODING: 4_000, FORWARDS: 800}
ONE_RUN_TARGET, SUM_TARGET = 0.6, 1.05


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Both cases: seconds together and apart, and their ratios.

    Args:
        quick: the first case alone, 32 images and one round, to see that everything works.
    """
    rounds = 1 if quick else ROUNDS
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        cases: dict[str, tuple[Sequence[Path | str], list[str]]] = {
            DECODING: (["demo-vit", "demo-clip"], DIGIT_NAMES),
        }
        if not quick:
            kinds = ("vit-tiny", "clip-tiny")
            for kind in kinds:
                make_checkpoint(root / kind, kind=kind)
            cases[FORWARDS] = [root / kind for kind in kinds], list(CLASSES)
        result: dict[str, Any] = {}
        for case, (models, classes) in cases.items():
            num_images = 32 if quick else NUM_IMAGES[case]
            shards = root / "shards" / case
            write(shards, photos(num_images), per_shard=max(16, num_images // 8), classes=classes)
            limits: dict[str, Any] = {"num_images": 32, "at_least_s": 0.3} if quick else {}
            result[case] = measure_case(shards, models, root / "out", rounds=rounds, limits=limits)
            result[case]["images"] = num_images
    return result


def measure_case(
    shards: Path, models: Sequence[Path | str], output: Path, *, rounds: int, limits: Mapping[str, Any]
) -> dict[str, Any]:
    """One run of all models, a run of each, and what bounds them, in turn."""
    names = [Path(model).name for model in models]
    ways: dict[str, Callable[[], Any]] = {
        "together": partial(run_own, shards, models, output),
        **{name: partial(run_own, shards, [model], output) for name, model in zip(names, models, strict=True)},
        "bound": partial(measure_bound, shards, models, **limits),
    }
    found = rounds_in_turn(ways, rounds)
    bounds = found.pop("bound")
    images = found["together"][0].images
    loop = {way: figure([run.loop_s for run in runs], "s") for way, runs in found.items()}
    wall = {way: figure([run.wall_s for run in runs], "s") for way, runs in found.items()}
    alone = figure([images / bound.images_per_s for bound in bounds], "s")
    return {
        "loop_s": loop,
        "wall_s": wall,
        "decode_and_forwards_s": alone,
        "one_run_of_two": ratio(loop["together"], added(loop, names)),
        "one_run_of_two_with_start": ratio(wall["together"], added(wall, names)),
        "of_decode_and_forwards": ratio(loop["together"], alone),
    }


def added(figures: Mapping[str, Figure], names: Sequence[str]) -> Figure:
    """The sum of several figures, round by round."""
    sums = [sum(each) for each in zip(*(figures[name]["rounds"] for name in names), strict=True)]
    return figure(sums, "s")


def table(result: dict[str, Any]) -> list[str]:
    """A case a block, a run a line."""
    lines: list[str] = []
    for case, each in result.items():
        title = f"{case}, {each['images']:,} images"
        lines.append(f"{title:<36}{'loop, s':>20}{'start included, s':>22}")
        for way in each["loop_s"]:
            lines.append(f"  {way:<34}{show(each['loop_s'][way]):>20}{show(each['wall_s'][way]):>22}")
        lines.append(f"  {'decode once and forwards, alone':<34}{show(each['decode_and_forwards_s']):>20}")
        with_start = show(each["one_run_of_two_with_start"], 2)
        lines.append(f"  {'one run / two runs':<34}{show(each['one_run_of_two'], 2):>20}{with_start:>22}")
        lines.append(f"  {'one run / decode and forwards':<34}{show(each['of_decode_and_forwards'], 2):>20}")
    return [
        *lines,
        f"targets: {ONE_RUN_TARGET} of two runs (decoding), {SUM_TARGET} of decode and forwards (forwards)",
    ]
