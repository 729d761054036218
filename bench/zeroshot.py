"""How much faster than open_clip's own loop is a zero-shot run?

Question: over the same shards of ImageNet-like JPEGs, how many times the images/s of open_clip's ViT-B-32 (its model,
          transforms, tokenizer and zero-shot classifier, metrics by torchmetrics) does `vitscore run` reach with a
          CLIP B/32 in transformers' format, all start-up included?
Expected: over 1.2: the forward is nearly all of the work, and is the same arithmetic in the same precision.
Command:  vitscore bench zeroshot
Method:   1,000 JPEGs, ten classes, one template; each in a separate process, in turn over three rounds. Architecture
          and input size are the same, the weights are not: both are random.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from vitscore.bench.harness.checkpoints import CLASSES, make_checkpoint
from vitscore.bench.harness.corpus import photos, write
from vitscore.bench.harness.runs import run_own
from vitscore.bench.harness.timing import ratio, rounds_in_turn, show
from vitscore.bench.peers.processes import run_peer
from vitscore.bench.peers.settings import best_settings
from vitscore.bench.whole import brief, rates

NUM_IMAGES, ROUNDS = 1_000, 3
TARGET = 1.2


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Rates of both, and their ratios.

    Args:
        quick: 32 images and one round, to see that everything works.
    """
    num_images, rounds = (32, 1) if quick else (NUM_IMAGES, ROUNDS)
    settings = best_settings("open_clip")[0]
    with tempfile.TemporaryDirectory() as name:
        shards, checkpoint = Path(name) / "shards", Path(name) / "clip-base-32"
        write(shards, photos(num_images), per_shard=max(16, num_images // 8), classes=list(CLASSES))
        make_checkpoint(checkpoint, kind="clip-base-32")
        own = partial(run_own, shards, [checkpoint], Path(name) / "out")
        peer = partial(run_peer, "open_clip", shards, checkpoint, settings)
        found: dict[str, Any] = rounds_in_turn({"vitscore": own, "open_clip": peer}, rounds)
    ours, theirs = rates(found["vitscore"], found["vitscore"][-1].settings), rates(found["open_clip"], str(settings))
    return {
        "images": num_images,
        "vitscore": ours,
        "open_clip": theirs,
        "ratio": ratio(ours["images_per_s"], theirs["images_per_s"]),
        "loop_ratio": ratio(ours["loop_images_per_s"], theirs["loop_images_per_s"]),
    }


def table(result: dict[str, Any]) -> list[str]:
    """A way a line."""
    lines = [f"{'images/s':<12}{'start included':>24}{'loop':>24}"]
    for way in ("vitscore", "open_clip"):
        each = result[way]
        lines.append(f"{way:<12}{brief(each['images_per_s']):>24}{brief(each['loop_images_per_s']):>24}")
        lines.append(f"  {each['settings']}")
    ratios = show(result["ratio"], 2), show(result["loop_ratio"], 2)
    return [*lines, f"{'ratio':<12}{ratios[0]:>24}{ratios[1]:>24}", f"target, start included: {TARGET}"]
