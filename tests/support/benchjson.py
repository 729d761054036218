"""Made-up results of benches, in the format of their JSON files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscore.bench.harness.timing import Figure, figure

HARDWARE = {"cpu": "Some CPU", "cpus": 16, "system": "Linux", "gpus": []}
VERSIONS = {"python": "3.12.1", "torch": "2.14.0"}


def images(*rounds: float) -> Figure:
    return figure(rounds, "images/s")


def results() -> dict[str, Any]:
    """Return the results that a plan needs: reading 90,000, decoding 4,000, ViT-B 6,000, CLIP L 2,000 images/s."""
    return {
        "reading": {
            "samples_per_s": {"vitscore": images(80_000, 90_000, 100_000), "webdataset": images(8_000, 8_100, 8_200)},
            "contents": {"large": {"samples": 10, "image_bytes": 1_100_000}},
        },
        "decoding": {
            "images_per_s": {
                "vitscore, 1 thread": images(400, 410),
                "vitscore, 16 threads": images(3_900, 4_000, 4_100),
                "DALI alone, 16 threads": images(3_000, 3_100, 3_200),
            }
        },
        "forward": {
            "images_per_s": {
                "vit-base fp16 eager batch 256": images(4_000, 4_100),
                "vit-base fp16 compiled batch 256": images(5_900, 6_000, 6_100),
                "clip-large-14 fp16 compiled batch 256": images(1_900, 2_000, 2_100),
            }
        },
        "whole": {
            "vitscore": {"images_per_s": images(2_000, 2_200), "loop_images_per_s": images(3_500, 3_600, 3_700)},
            "bound_images_per_s": images(4_000, 4_000, 4_000),
            "pipeline batch 64": {"images_per_s": images(600, 700, 800), "loop_images_per_s": images(900, 900)},
            "timm": {"images_per_s": images(800, 900), "other_settings": [{"images_per_s": images(1, 2)}]},
        },
        "startup": {"first_batch_s": figure([20.0, 20.0, 21.0], "s")},
        "offline": {
            "rows": 1_000_000,
            "models": 2,
            "parts_bytes": 90_000_000,
            "commands": {"metrics": {"seconds": figure([1.2, 1.3, 1.4], "s")}},
        },
    }


def write(
    folder: Path,
    results_by_bench: Mapping[str, Any],
    *,
    gpus: Sequence[str] = (),
    versions: Mapping[str, Any] = VERSIONS,
    is_quick: bool = False,
) -> Path:
    """Write results as one JSON file per bench, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results_by_bench.items():
        document = {
            "schema": 1,
            "bench": name,
            "started": "2026-11-20T10:00:00Z",
            "seconds": 1.0,
            "quick": is_quick,
            "hardware": {**HARDWARE, "gpus": list(gpus)},
            "versions": dict(versions),
            "commit": None,
            "result": result,
        }
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder
