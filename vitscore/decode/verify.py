"""Verify: decode everything in a corpus and report every fault, with no model.

Beside the main flow: shards, samples and the decoder as a run has them, so that what verify passes, a run can score.
Pixels are thrown away. It prints nothing; faults and progress are calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vitscore.decode.make import make_decoder
from vitscore.decode.pixels import MAX_PIXELS, Decoder, is_dali_available
from vitscore.preprocess import Geometry
from vitscore.shards.labels import LabelRule
from vitscore.shards.remote.cache import Cache, fetch_ahead
from vitscore.shards.samples import OpenShard, SampleBlock
from vitscore.shards.shard import Shard

# The smallest of pictures: decoding is what is verified, so the resize should cost nothing.
GEOMETRY = Geometry(resize="exact", size=(8, 8), interpolation="bilinear")


@dataclass(frozen=True)
class Fault:
    """Something wrong: with a shard where `key` is None, else with a sample."""

    shard: str
    key: str | None
    reason: str


@dataclass
class Verified:
    """What was looked at, and how much of it is bad."""

    num_shards: int = 0
    num_samples: int = 0
    num_bad_shards: int = 0
    num_bad_samples: int = 0

    @property
    def is_sound(self) -> bool:
        return not (self.num_bad_shards or self.num_bad_samples)


def verify_shards(
    shards: Sequence[Shard],
    *,
    labels: LabelRule,
    num_threads: int,
    image_key: str | None = None,
    decoder: Literal["auto", "dali", "torchvision"] = "auto",
    batch_size: int = 64,
    max_pixels: int = MAX_PIXELS,
    cache: Cache | None = None,
    on_fault: Callable[[Fault], None] = lambda fault: None,
    on_shard: Callable[[], None] = lambda: None,
) -> Verified:
    """Open every shard, decode every image, judge every label.

    Args:
        shards: what to verify.
        labels: how labels are judged; a rule without classes takes any.
        num_threads: threads that decode.
        image_key: the only extension that is an image.
        decoder: auto is DALI where it is installed.
        batch_size: images decoded at once.
        max_pixels: an image that declares more is a fault.
        cache: where remote and compressed shards lie while they are read.
        on_fault: called for each fault, in shard order.
        on_shard: called after each shard.

    Raises:
        SetupError: the decoder is not installed.
    """
    is_dali = decoder == "dali" or (decoder == "auto" and is_dali_available())
    decoding = make_decoder(
        "dali" if is_dali else "torchvision",
        [GEOMETRY],
        batch_size=batch_size,
        num_threads=num_threads,
        max_pixels=max_pixels,
    )
    verified = Verified()
    try:
        cache = cache or Cache()
        for _, shard, file in fetch_ahead(((None, shard) for shard in shards), cache):
            with OpenShard(shard, labels=labels, image_key=image_key, file=file, cache=cache) as opened:
                for fault in _shard_faults(opened, decoding, batch_size):
                    verified.num_bad_samples += 1
                    on_fault(fault)
                verified.num_shards += 1
                verified.num_samples += opened.num_samples
                if opened.fault is not None:
                    verified.num_bad_shards += 1
                    on_fault(Fault(shard.name, None, opened.fault))
            on_shard()
    finally:
        decoding.close()
    return verified


def _shard_faults(opened: OpenShard, decoding: Decoder, batch_size: int) -> list[Fault]:
    """The faults of a shard's samples, in shard order."""
    reasons: dict[int, str] = {}
    waiting: deque[_Submitted] = deque()
    for start in range(0, opened.num_samples, batch_size):
        block = opened.read(start, start + batch_size)
        reasons.update((start + row, reason) for row, reason in enumerate(block.reasons) if reason is not None)
        submitted = _Submitted.of(block, start)
        if submitted.rows:
            decoding.submit(submitted.images)
            waiting.append(submitted)
        while len(waiting) >= max(1, decoding.depth):
            waiting.popleft().collect(decoding, reasons)
    while waiting:
        waiting.popleft().collect(decoding, reasons)
    return [Fault(opened.shard.name, opened.keys[row], reasons[row]) for row in sorted(reasons)]


@dataclass
class _Submitted:
    """A batch on its way through the decoder: its rows in the shard, and the bytes that must stay until it is back."""

    rows: list[int]
    images: list[NDArray[np.uint8]]

    @classmethod
    def of(cls, block: SampleBlock, start: int) -> _Submitted:
        images = [(start + row, image) for row, image in enumerate(block.images) if image is not None]
        return cls([row for row, _ in images], [image for _, image in images])

    def collect(self, decoding: Decoder, reasons: dict[int, str]) -> None:
        faults = decoding.collect().faults
        reasons.update((self.rows[position], reason) for position, reason in faults.items())
