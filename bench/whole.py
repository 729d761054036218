"""How much faster than transformers' own pipeline is a whole run?

Question: over the same shards of ImageNet-like JPEGs and the same ViT-Tiny/16 checkpoint (random weights, fp32), how
many times the images/s of `pipeline("image-classification", batch_size=64)` does `vitscore run` reach, start-up
included, both in processes of their own on the same cores?
Expected: over 1.5 on two cores without bf16: both are bound by the same fp32 forward; vitscore saves in decoding.
Command:  python -m vitscore.bench whole
Method:   1,000 images; wall time of the whole process; the peer reads the shards through webdataset.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vitscore.bench.corpus import photos, write

NUM_IMAGES = 1_000
NAMES = [f"class {number}" for number in range(10)]

PEER = """
import io, sys, glob, torch, webdataset as wds
from PIL import Image
from transformers import pipeline
shards, checkpoint = sys.argv[1:]
classify = pipeline("image-classification", model=checkpoint, device="cpu")
def images():
    for sample in wds.WebDataset(sorted(glob.glob(shards + "/*.tar")), shardshuffle=False, empty_check=False):
        yield Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
count = sum(1 for _ in classify(images(), batch_size=64, top_k=5))
sys.stdout.write(str(count))
"""


def measure(num_images: int = NUM_IMAGES) -> dict[str, Any]:
    """Images a second of both, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write(root / "shards", photos(num_images), per_shard=250, classes=NAMES)
        make_checkpoint(root / "vit-tiny")
        peer = wall_s([sys.executable, "-c", PEER, str(root / "shards"), str(root / "vit-tiny")])
        command = [sys.executable, "-m", "vitscore", "run", str(root / "shards"), "-m", str(root / "vit-tiny")]
        own = wall_s([*command, "-o", str(root / "out")])
        session = json.loads((root / "out" / "run.json").read_bytes())["sessions"][-1]
    return {
        "images": num_images,
        "pipeline_images_per_s": num_images / peer,
        "vitscore_images_per_s": num_images / own,
        "vitscore_loop_images_per_s": session["images_per_s"],
        "ratio": peer / own,
    }


def make_checkpoint(folder: Path) -> None:
    """A ViT-Tiny/16 at 224 pixels with random weights, in the standard files."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)


def wall_s(command: list[str]) -> float:
    """Seconds that a process takes from start to end."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def table(result: dict[str, Any]) -> list[str]:
    return [
        f"{'transformers pipeline, batch 64':<34}{result['pipeline_images_per_s']:>8,.1f} images/s",
        f"{'vitscore run, start included':<34}{result['vitscore_images_per_s']:>8,.1f} images/s",
        f"{'vitscore run, its loop alone':<34}{result['vitscore_loop_images_per_s']:>8,.1f} images/s",
        f"ratio: {result['ratio']:.2f}",
    ]
