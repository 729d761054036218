"""Shards for the benches, made from data that scikit-learn ships: the same bytes from the same seed.

`photos` are JPEGs like ImageNet's: crops of two real photographs, mixed aspect, about 475 pixels a side and 105 KB.
`digits` are the 1,797 scanned digits of 8 x 8 pixels as PNGs, over and over, each with its own grey noise, so that no
two files are equal and nothing but the per-image cost counts.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

SEED = 20260101
Sample = tuple[bytes, str, int]
"""Encoded image, extension, label."""


def photos(count: int) -> Iterator[Sample]:
    """JPEGs of about 475 pixels a side and 105 KB, in ten made-up classes."""
    random = np.random.default_rng(SEED)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        source = sources[number % len(sources)]
        width, height = (int(side) for side in random.integers(300, 427, 2))
        left = int(random.integers(0, source.width - width + 1))
        top = int(random.integers(0, source.height - height + 1))
        scale = float(random.uniform(1.1, 1.5))
        crop = source.crop((left, top, left + width, top + height))
        image = crop.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=97)
        yield buffer.getvalue(), "jpg", number % 10


def digits(count: int) -> Iterator[Sample]:
    """8 x 8 grey PNGs with their true labels."""
    random = np.random.default_rng(SEED)
    images_N88, labels_N = load_digits(return_X_y=True)
    for number in range(count):
        pixels = images_N88[number % len(labels_N)].reshape(8, 8) * 15 + random.integers(0, 8, (8, 8))
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        yield buffer.getvalue(), "png", int(labels_N[number % len(labels_N)])


def write(folder: Path, samples: Iterator[Sample], *, per_shard: int, classes: list[str]) -> list[Path]:
    """Write samples as shards with a `classes.txt` beside them; returns the shards' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    paths: list[Path] = []
    writer = None
    for number, (data, extension, label) in enumerate(samples):
        if number % per_shard == 0:
            if writer is not None:
                writer.close()
            paths.append(folder / f"s-{len(paths):05d}.tar")
            writer = wds.TarWriter(str(paths[-1]), encoder=False, mtime=0)
        assert writer is not None
        writer.write({"__key__": f"{number:08d}", extension: data, "cls": str(label).encode()})
    if writer is not None:
        writer.close()
    return paths
