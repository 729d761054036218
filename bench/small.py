"""How fast are small images, where everything but the forward counts?

Question: over PNGs of 8 x 8 pixels and the demo's small models, how many times the images/s of transformers' pipeline
          and of a careful hand-written loop does `vitscore run` reach? And what share of its bound is its loop?
Expected: 8 times the pipeline, 3 times the loop.
Command:  vitscore bench small
Method:   demo-vit and, in another row, demo-clip; 20,000 images for vitscore, 4,000 for the hand-written loop and 2,000
          for the pipeline (at batch 64 in fp32, and at its best), which has the same work for each image; each in a
          separate process, in turn over three rounds. The ratios are of the loops alone, since start-up would be
          another part of each; the rates with the start stand beside. Decode and forward alone as in `whole`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitscore.bench.harness.corpus import digits, write
from vitscore.bench.harness.runs import run_own
from vitscore.bench.harness.timing import ratio, rounds_in_turn, show
from vitscore.bench.memory import NAMES
from vitscore.bench.peers.bound import measure_bound
from vitscore.bench.peers.processes import run_peer
from vitscore.bench.peers.settings import Settings
from vitscore.bench.whole import bound_figures, rates
from vitscore.plan.choices import has_bf16_instructions

ROUNDS = 3
PIPELINE, BEST, LOOP = "pipeline batch 64", "pipeline, best", "hand-written loop"
NUM_IMAGES = {"vitscore": 20_000, PIPELINE: 2_000, BEST: 2_000, LOOP: 4_000}
PEERS = {PIPELINE: "pipeline", BEST: "pipeline", LOOP: "loop"}
TARGETS = {PIPELINE: 8.0, LOOP: 3.0}


def measure(*, quick: bool = False) -> dict[str, Any]:
    """By model, rates of all ways, their ratios, the bound and our share of it.

    Args:
        quick: 256 images each, one round, demo-vit alone: to see that everything works.
    """
    rounds = 1 if quick else ROUNDS
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for way, num_images in NUM_IMAGES.items():
            count = 256 if quick else num_images
            write(root / way, digits(count), per_shard=max(64, count // 16), classes=NAMES)
        models = ("demo-vit",) if quick else ("demo-vit", "demo-clip")
        return {model: measure_model(root, model, rounds=rounds, is_short=quick) for model in models}


def peer_settings() -> dict[str, Settings]:
    """By peer: as everybody has it, and the settings that a sweep on two cores found best (see LOG.md)."""
    half = "half" if torch.cuda.is_available() or has_bf16_instructions() else "fp32"
    return {
        PIPELINE: Settings(64),
        BEST: Settings(128, half),
        LOOP: Settings(64, half, workers=2, threads=1),
    }


def measure_model(root: Path, model: str, *, rounds: int, is_short: bool) -> dict[str, Any]:
    from vitscore.models import checkpoint as checkpoints

    folder = checkpoints.find(model).path
    settings = peer_settings()
    limits: dict[str, Any] = {"num_images": 128, "at_least_s": 0.3} if is_short else {"num_images": 4_096}
    ways: dict[str, Callable[[], Any]] = {
        "vitscore": partial(run_own, root / "vitscore", [model], root / "out"),
        **{way: partial(run_peer, name, root / way, folder, settings[way]) for way, name in PEERS.items()},
        "bound": partial(measure_bound, root / "vitscore", [model], **limits),
    }
    found = rounds_in_turn(ways, rounds)
    bounds = found.pop("bound")
    result: dict[str, Any] = {"vitscore": rates(found["vitscore"], found["vitscore"][-1].settings)}
    for way in PEERS:
        result[way] = rates(found[way], str(settings[way]))
    own = result["vitscore"]["loop_images_per_s"]
    result["loop_ratios"] = {way: ratio(own, result[way]["loop_images_per_s"]) for way in PEERS}
    return {**result, **bound_figures(own, bounds)}


def table(result: dict[str, Any]) -> list[str]:
    """A model a block, a way a line."""
    lines: list[str] = []
    for model, each in result.items():
        lines.append(f"{model + ', images/s':<20}{'start included':>23}{'loop':>23}{'ours':>7}{'target':>7}")
        for way in ("vitscore", *PEERS):
            shown = f"{show(each[way]['images_per_s'], 0):>23}{show(each[way]['loop_images_per_s'], 0):>23}"
            if way in PEERS:
                shown += f"{each['loop_ratios'][way]['median']:>6.1f}x"
                shown += f"{TARGETS[way]:>6.1f}x" if way in TARGETS else ""
            lines.append(f"  {way:<18}{shown}")
        for stage in ("decode", "forward", "bound"):
            alone = "" if stage == "bound" else " alone"
            lines.append(f"  {stage + alone:<41}{show(each[f'{stage}_images_per_s'], 0):>23}")
        lines.append(f"  {'our loop / the bound':<41}{show(each['share_of_bound'], 2):>23}")
    settings = next(iter(result.values()))
    return [*lines, *(f"{way}: {settings[way]['settings']}" for way in ("vitscore", *PEERS))]
