"""Shards for the benches, made from data that scikit-learn ships: the same bytes from the same seed.

`photos` are JPEGs like ImageNet's: crops of two real photographs, mixed aspect, about 475 pixels a side and 105 KB.
`digits` are the 1,797 scanned digits of 8 x 8 pixels as PNGs, over and over, each with its own grey noise, so that no
two files are equal and nothing but the per-image cost counts.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

SEED = 20260101
Sample = tuple[bytes, str, int]
"""Encoded image, extension, label."""


class Crop(NamedTuple):
    """Which part of a photograph, and how large it becomes."""

    number: int
    box: tuple[int, int, int, int]
    size: tuple[int, int]


def photos(count: int, *, workers: int = 1) -> Iterator[Sample]:
    """JPEGs of about 475 pixels a side and 105 KB, in ten made-up classes.

    Args:
        count: how many.
        workers: processes that encode, 7 ms an image; the bytes do not depend on it.
    """
    crops = list(draw_crops(count))
    if workers == 1:
        yield from map(encode, crops)
        return
    sources()  # read once, before the processes are forked
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(encode, crops, chunksize=max(1, count // (4 * workers)))


def draw_crops(count: int) -> Iterator[Crop]:
    random = np.random.default_rng(SEED)
    for number in range(count):
        source = sources()[number % 2]
        width, height = (int(side) for side in random.integers(300, 427, 2))
        left = int(random.integers(0, source.width - width + 1))
        top = int(random.integers(0, source.height - height + 1))
        scale = float(random.uniform(1.1, 1.5))
        yield Crop(number, (left, top, left + width, top + height), (round(width * scale), round(height * scale)))


def encode(crop: Crop) -> Sample:
    image = sources()[crop.number % 2].crop(crop.box).resize(crop.size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=97)
    return buffer.getvalue(), "jpg", crop.number % 10


@cache
def sources() -> list[Image.Image]:
    """The two photographs that scikit-learn ships."""
    return [Image.fromarray(image) for image in load_sample_images().images]


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


def repeat(shards: Path, target: Path, times: int) -> list[Path]:
    """Make a folder that holds every shard of another one `times` over, without a second copy of its bytes.

    Keys repeat, in shards of other names: to a run these are other samples.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / "classes.txt").write_bytes((shards / "classes.txt").read_bytes())
    originals = sorted(shards.glob("*.tar"))
    paths = [target / f"s-{number:05d}.tar" for number in range(len(originals) * times)]
    for number, path in enumerate(paths):
        os.link(originals[number % len(originals)], path)
    return paths
