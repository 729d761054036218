"""Small pictures of chosen samples, read from their shards, as data URIs.

The only part of the report that reads images. Problems never fail a report: a shard that is missing, has changed or
cannot be read is named, and its samples have no pictures. The caller bounds their number and bytes. Pillow decodes;
neither torch nor DALI is needed.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vitscore.errors import VitscoreError
from vitscore.report.samples import Sample
from vitscore.shards.labels import LabelRule
from vitscore.shards.locate import locate
from vitscore.shards.redaction import is_remote
from vitscore.shards.samples import OpenShard
from vitscore.shards.shard import Shard, find_again
from vitscore.system.machine import num_usable_cpus

SIDE = 144
"""Longest side in pixels: sharp at 72 CSS pixels on a high-density screen, about 4 kB."""
SMALL = 48
"""Images up to this side are encoded without loss."""
MOST_BYTES = 2_600_000
"""Maximum size of all data URIs together."""


@dataclass
class Thumbnails:
    """Data URIs by (shard ordinal, row), and the reasons for missing ones."""

    images: dict[tuple[int, int], str] = field(default_factory=dict)
    wanted: int = 0
    lost_shards: dict[str, str] = field(default_factory=dict)
    """Shards that could not be read, each with its reason."""
    num_unreadable: int = 0
    """Samples in readable shards whose image is missing or cannot be decoded."""
    is_full: bool = False
    """Whether pictures were left out to keep the report small."""

    @property
    def notes(self) -> list[str]:
        """Sentences that say which pictures are missing, and why."""
        notes = []
        if self.lost_shards:
            name, reason = next(iter(self.lost_shards.items()))
            more = f", and {len(self.lost_shards) - 1:,} more" if len(self.lost_shards) > 1 else ""
            notes.append(f"Shards could not be read again, so their images are not shown: {name} ({reason}){more}.")
        if self.num_unreadable:
            notes.append(f"{self.num_unreadable:,} images could not be decoded and are not shown.")
        if self.is_full:
            notes.append("Some images are left out to keep this file small.")
        return notes


def find_shards(listed: Sequence[Mapping[str, Any]], specs: Sequence[str], *, split: str) -> dict[int, Shard]:
    """The run's shards at their present place, by ordinal; matched by name, or by base name if that is unique.

    Args:
        listed: rows of shards.parquet: `ordinal`, `name`.
        specs: shards as the command line takes them.
        split: the split of a data set in CLIP_benchmark's layout.
    """
    try:
        present = locate(specs, split=split, has_remote_sizes=False).shards
    except VitscoreError:
        return {}
    candidates = find_again([row["name"] for row in listed], present)
    return {int(row["ordinal"]): match[0] for row, match in zip(listed, candidates, strict=True) if len(match) == 1}


def make_thumbnails(
    samples: Iterable[Sample],
    places: Mapping[int, Shard],
    *,
    image_key: str | None,
    max_pixels: int,
    max_bytes: int = MOST_BYTES,
    may_fetch: bool = False,
) -> Thumbnails:
    """Make a picture of each sample; if not all fit, the first ones are kept.

    Args:
        samples: in order of importance; duplicates count once.
        places: the shards by ordinal.
        image_key: the extension of the image, as in the run.
        max_pixels: images that declare more are not decoded.
        max_bytes: maximum size of all data URIs together.
        may_fetch: read remote shards too.
    """
    ordered = list({sample.place: sample for sample in samples}.values())
    made = Thumbnails(wanted=len(ordered))
    drawn: dict[tuple[int, int], str] = {}
    # Warning filters are not thread-safe, so they are set before the threads start.
    with ThreadPoolExecutor(num_usable_cpus()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ordinal in sorted({sample.ordinal for sample in ordered}):
            inside = [sample for sample in ordered if sample.ordinal == ordinal]
            if ordinal in places and not may_fetch and is_remote(places[ordinal].path):
                made.lost_shards[inside[0].shard] = "not fetched again for pictures"
                continue
            encoded = _of_one_shard(inside, places.get(ordinal), made, image_key=image_key)
            uris = pool.map(partial(draw, max_pixels=max_pixels), encoded.values())
            good = {place: uri for place, uri in zip(encoded, uris, strict=True) if uri is not None}
            made.num_unreadable += len(encoded) - len(good)
            drawn |= good
    num_bytes = 0
    for sample in ordered:
        uri = drawn.get(sample.place)
        if uri is not None and num_bytes + len(uri) <= max_bytes:
            made.images[sample.place] = uri
            num_bytes += len(uri)
    made.is_full = len(made.images) < len(drawn)
    return made


def _of_one_shard(
    samples: Sequence[Sample], place: Shard | None, made: Thumbnails, *, image_key: str | None
) -> dict[tuple[int, int], bytes]:
    """The encoded images of samples of one shard, by place; problems are noted in `made`."""
    name = samples[0].shard
    if place is None:
        made.lost_shards[name] = "not found"
        return {}
    encoded: dict[tuple[int, int], bytes] = {}
    try:
        with OpenShard(place, image_key=image_key, labels=LabelRule(None), will_read=False) as opened:
            if opened.fault is not None and not opened.num_samples:
                made.lost_shards[name] = opened.fault
                return {}
            for sample in samples:
                if sample.row >= opened.num_samples or opened.keys[sample.row] != sample.key:
                    made.lost_shards[name] = "has changed"
                    break
                (image,) = opened.read(sample.row, sample.row + 1).images
                if image is None:
                    made.num_unreadable += 1
                else:
                    encoded[sample.place] = np.asarray(image).tobytes()
    except (OSError, VitscoreError) as error:
        made.lost_shards[name] = str(error)
    return encoded


def draw(encoded: bytes, *, max_pixels: int, side: int = SIDE) -> str | None:
    """A small WebP of an encoded image as a data URI; None if it cannot be decoded or declares too many pixels."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.width * image.height > max_pixels:
                return None
            image.draft("RGB", (side, side))
            turned = ImageOps.exif_transpose(image)
            has_alpha = "A" in turned.getbands() or "transparency" in turned.info
            small = turned.convert("RGBA" if has_alpha else "RGB")
            small.thumbnail((side, side), reducing_gap=2.0)
            buffer = io.BytesIO()
            small.save(buffer, "WEBP", quality=62, lossless=max(small.size) <= SMALL, method=4)
    # Pillow's decoders raise exceptions of any kind on damaged images.
    except Exception:
        return None
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
