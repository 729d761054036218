"""How much do corrupt images slow down the others?

Question: how fast is a run with 1% corrupt images, as a ratio of the same run without? Three ways: ViT-Tiny/16, which
is bound by its forward, with images damaged where only the decoder sees it (each costs its batch a second decode); the
demo's small ViT, which is bound by decoding, with cut files, the usual damage, which is seen before decoding; and the
same with hidden damage, the worst case: each bad image sends the 16 of its piece through the decoder again.
Expected: at least 0.9, 0.9 and, for the worst case, 0.8 (0.65 where whole batches of 128 went again; measured 0.49).
Command:  vitscore bench corrupt
Method:   ImageNet-like JPEGs, the loop's rate as run.json has it; the runs of a pair by turns, three each, the median.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vitscore.bench.harness.checkpoints import make_checkpoint
from vitscore.bench.harness.corpus import Sample, photos, write
from vitscore.bench.harness.timing import figure, ratio, show
from vitscore.bench.memory import NAMES as DIGIT_NAMES
from vitscore.bench.memory import score

EVERY = 100
ROUNDS = 3


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def without_tables(content: bytes) -> bytes:
    """A JPEG without quantisation tables: whole by its markers, and no decoder can read it."""
    while (at := content.find(b"\xff\xdb")) >= 0:
        content = content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :]
    return content


DAMAGES: dict[str, Callable[[bytes], bytes]] = {"none": bytes, "cut": cut, "hidden": without_tables}


def damaged(samples: Iterator[Sample], damage: str) -> Iterator[Sample]:
    """Every hundredth image damaged, at places that drift through the batches."""
    for number, (content, extension, label) in enumerate(samples):
        is_bad = number % EVERY == (number // EVERY * 37) % EVERY
        yield DAMAGES[damage](content) if is_bad else content, extension, label


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Images a second of each kind, and their ratio."""
    num_large, num_small, rounds = (100, 500, 1) if quick else (400, 4_000, ROUNDS)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_checkpoint(root / "vit-tiny")
        for what, model, damage, count in (
            ("bound by the forward, hidden damage", str(root / "vit-tiny"), "hidden", num_large),
            ("bound by decoding, cut files", "demo-vit", "cut", num_small),
            ("bound by decoding, hidden damage", "demo-vit", "hidden", num_small),
        ):
            rates: dict[str, list[float]] = {"none": [], damage: []}
            for kind in rates:
                classes = DIGIT_NAMES if model == "demo-vit" else [f"class {number}" for number in range(10)]
                write(root / kind, damaged(photos(count), kind), per_shard=500, classes=classes)
            for number in range(rounds):
                for kind, found in rates.items():
                    out = root / f"out-{what}-{kind}-{number}"
                    found.append(score(root / kind, out, models=[model])["images_per_s"])
            # Images read, not images scored: a corrupt one is no image that the run could have scored.
            corrupt = figure([found / (1 - 1 / EVERY) for found in rates[damage]], "images/s")
            clean = figure(rates["none"], "images/s")
            result[what] = {
                "clean_images_per_s": clean,
                "corrupt_images_per_s": corrupt,
                "ratio": ratio(corrupt, clean),
            }
    return result


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'images/s read':<36}{'clean':>8}{'1% corrupt':>12}{'ratio':>20}"]
    for what, figures in result.items():
        clean, corrupt = (figures[f"{kind}_images_per_s"]["median"] for kind in ("clean", "corrupt"))
        lines.append(f"{what:<36}{clean:>8,.1f}{corrupt:>12,.1f}{show(figures['ratio'], 2):>20}")
    return lines
