"""How much faster than what people use is a whole run, and how near to its own bound?

Question: over the same shards of ImageNet-like JPEGs and the same ViT-Tiny/16 checkpoint (random weights), how many
          images a second does `vitscore run` reach, all start-up included, against transformers' pipeline at batch 64
          and at its best, against a careful hand-written loop, and against timm's model of the same size? And what
          share of its bound does its loop reach: decode and forward measured alone?
Expected: 3.0 times the pipeline at batch 64, 1.5 times the hand-written loop, 0.92 of the bound. On a GPU ViT-B/16:
          0.9 of the bound; on an H200 9,000 images/s.
Command:  vitscore bench whole
Method:   2,000 JPEGs; every way in a separate process (see peers, bound), in turn over three rounds; images over the
          seconds from the process' start to its end, and over those of its loop alone. The peers run at the settings
          that a sweep found best on such a machine; of two the better is taken. timm's model is of the same
          architecture and input size, with other weights. The pipeline's predictions are compared with ours. On a
          GPU the JPEGs are in the shards ten times over, so that a loop takes seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from vitscore.bench.harness.checkpoints import CLASSES, make_checkpoint
from vitscore.bench.harness.corpus import photos, write
from vitscore.bench.harness.runs import OwnRun, predictions_of, run_own
from vitscore.bench.harness.timing import Figure, figure, ratio, rounds_in_turn, show
from vitscore.bench.peers.bound import Bound, measure_bound
from vitscore.bench.peers.processes import PeerRun, run_peer
from vitscore.bench.peers.settings import Settings, best_settings

TARGETS = {"pipeline batch 64": 3.0, "hand-written loop": 1.5}
BOUND_TARGET = 0.92
LOOP, PIPELINE, PLAIN_PIPELINE = "hand-written loop", "pipeline, best", "pipeline batch 64"


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    kind: str
    """Of checkpoint."""
    images: int
    times: int
    """How often each image is in the shards."""
    rounds: int


QUICK = Extent("vit-tiny", images=48, times=1, rounds=1)
ON_CPU = Extent("vit-tiny", images=2_000, times=1, rounds=3)
ON_GPU = Extent("vit-base", images=2_000, times=10, rounds=3)


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Rates of all ways and their ratios, the bound and our share of it, and where predictions differ.

    Args:
        quick: 48 images and one round, to see that everything works.
    """
    extent = QUICK if quick else ON_GPU if has_gpu() else ON_CPU
    num_images = extent.images * extent.times
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        images = chain.from_iterable(repeat(list(photos(extent.images)), extent.times))
        write(root / "shards", images, per_shard=num_images // 8, classes=list(CLASSES))
        make_checkpoint(root / "model", kind=extent.kind)
        settings = peer_settings(extent)
        ways: dict[str, Callable[[], Any]] = {
            "vitscore": partial(run_own, root / "shards", [root / "model"], root / "out"),
            **{way: partial(start_peer, root, way, each) for way, each in settings.items()},
            "bound": partial(bound_of, root, is_short=quick),
        }
        found = rounds_in_turn(ways, extent.rounds)
        own_predictions = predictions_of(root / "out", "model")
    agreement = {}
    if PLAIN_PIPELINE in found:
        agreement["agreement"] = compare(own_predictions, found[PLAIN_PIPELINE][-1])
    own, bounds = found.pop("vitscore"), found.pop("bound")
    result: dict[str, Any] = {
        "model": extent.kind,
        "images": num_images,
        "vitscore": rates(own, own[-1].settings),
        **{way: rates(runs, str(settings[way])) for way, runs in found.items()},
    }
    for kind in (PIPELINE, LOOP):
        keep_better(result, kind)
    peers = [way for way in (PLAIN_PIPELINE, PIPELINE, LOOP, "timm") if way in result]
    result["ratios"] = ratios(result, peers, "images_per_s")
    result["loop_ratios"] = ratios(result, peers, "loop_images_per_s")
    return {**result, **bound_figures(result["vitscore"]["loop_images_per_s"], bounds), **agreement}


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def peer_settings(extent: Extent) -> dict[str, Settings]:
    """By way; a quick run has each kind of peer once, with one thread, so that it is short beside other work too."""
    pipelines = () if extent is QUICK else best_settings("pipeline")
    loops = best_settings("loop")[: 1 if extent is QUICK else None]
    settings = {
        PLAIN_PIPELINE: Settings(batch_size=64),
        **{f"{PIPELINE} {number}": each for number, each in enumerate(pipelines, 1)},
        **{f"{LOOP} {number}": each for number, each in enumerate(loops, 1)},
    }
    if extent.kind == "vit-tiny":  # the size of timm's
        settings["timm"] = best_settings("timm")[0]
    return {way: replace(each, threads=1) for way, each in settings.items()} if extent is QUICK else settings


def start_peer(root: Path, way: str, settings: Settings) -> PeerRun:
    name = "loop" if way.startswith(LOOP) else way.split()[0].rstrip(",")
    return run_peer(name, root / "shards", root / "model", settings, predictions=root / "predictions.json")


def bound_of(root: Path, *, is_short: bool) -> Bound:
    limits: dict[str, Any] = {"num_images": 48, "at_least_s": 0.3} if is_short else {}
    return measure_bound(root / "shards", [root / "model"], **limits)


def rates(runs: Sequence[OwnRun | PeerRun], settings: str) -> dict[str, Any]:
    """Images/s with the start and of the loop alone."""
    return {
        "images_per_s": figure([run.images / run.wall_s for run in runs], "images/s"),
        "loop_images_per_s": figure([run.images / run.loop_s for run in runs], "images/s"),
        "settings": settings,
    }


def keep_better(result: dict[str, Any], kind: str) -> None:
    """Keep the fastest settings of a peer as its result, and the others apart."""
    tried = [result.pop(way) for way in list(result) if way.startswith(kind)]
    tried.sort(key=lambda each: -each["images_per_s"]["median"])
    if tried:
        result[kind] = {**tried[0], "other_settings": tried[1:]}


def ratios(result: Mapping[str, Any], peers: Sequence[str], key: str) -> dict[str, Any]:
    return {peer: ratio(result["vitscore"][key], result[peer][key]) for peer in peers}


def bound_figures(loop: dict[str, Any], bounds: Sequence[Bound]) -> dict[str, Any]:
    bound = figure([each.images_per_s for each in bounds], "images/s")
    return {
        "decode_images_per_s": figure([each.decode for each in bounds], "images/s"),
        "forward_images_per_s": figure([each.all_forwards for each in bounds], "images/s"),
        "bound_images_per_s": bound,
        "share_of_bound": ratio(loop, bound),
    }


def compare(own: Mapping[str, int], peer: PeerRun) -> dict[str, Any]:
    """How many images the pipeline gives another class, and by how much its best probability leads there."""
    leads = [lead for key, (pred, lead) in peer.predictions.items() if own[key] != pred]
    return {"images": len(own), "differ": len(leads), "largest_lead": max(leads, default=0.0)}


def brief(rate: Figure) -> str:
    """A rate with as many digits as it deserves."""
    return show(rate, 0 if rate["high"] >= 1_000 else 1)


def table(result: dict[str, Any]) -> list[str]:
    """A way a line."""
    lines = [f"{'images/s':<18}{'start included':>24}{'loop':>24}{'ours':>7}{'loop':>7}"]
    for way in ("vitscore", *result["ratios"]):
        each = result[way]
        times = [result[key][way]["median"] if way in result[key] else None for key in ("ratios", "loop_ratios")]
        shown = "".join(f"{value:>6.2f}x" if value else "" for value in times)
        lines.append(f"{way:<18}{brief(each['images_per_s']):>24}{brief(each['loop_images_per_s']):>24}{shown}")
    for way in ("vitscore", *result["ratios"]):
        lines.append(f"{way + ':':<19} {result[way]['settings']}")
    for way, target in TARGETS.items():
        if way in result["ratios"]:
            lines.append(f"{'against ' + way:<31}{show(result['ratios'][way], 2):>20}, target {target}")
    for stage in ("decode", "forward", "bound"):
        alone = "" if stage == "bound" else " alone"
        lines.append(f"{stage + alone:<31}{brief(result[f'{stage}_images_per_s']):>24} images/s")
    lines.append(f"{'our loop / the bound':<31}{show(result['share_of_bound'], 2):>20}, target {BOUND_TARGET}")
    if (agreement := result.get("agreement")) is None:
        return lines
    return [
        *lines,
        f"top-1 unlike the pipeline's: {agreement['differ']:,} of {agreement['images']:,}, where its best leads by at "
        f"most {agreement['largest_lead']:.4f}",
    ]
