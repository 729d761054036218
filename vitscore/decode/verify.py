"""Decode every image of a corpus and report every fault, without a model.

Verification uses the shard reader, the label rules and the decoder of a run, so a run can score every sample that
passes. Pixels are dropped. This module prints nothing; it reports faults and progress through callbacks.
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

# Only decoding is verified, so the resize should be cheap.
GEOMETRY = Geometry(resize="exact", size=(8, 8), interpolation="bilinear")


@dataclass(frozen=True)
class Fault:
    """A fault of a sample, or of a shard if `key` is None."""

    shard: str
    key: str | None
    reason: str


@dataclass
class Verified:
    """Counts of the shards and samples that were verified, and of the bad ones."""

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
    """Open every shard, decode every image, and check every label; one argument per option of the command.

    Args:
        shards: the shards to verify.
        labels: the rule that checks labels; without classes it accepts any label.
        num_threads: the number of decoding threads.
        image_key: the only extension to treat as an image.
        decoder: "auto" is DALI if it is installed, else torchvision.
        batch_size: the number of images per batch.
        max_pixels: an image that declares more pixels is a fault.
        cache: holds remote and compressed shards while they are read.
        on_fault: called for each fault, in shard order.
        on_shard: called after each shard.

    Raises:
        SetupError: the decoder is not installed or does not work.
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
    """Return the faults of a shard's samples, in shard order."""
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
    """A batch in the decoder: its rows in the shard, and the bytes, which must stay until it is collected."""

    rows: list[int]
    images: list[NDArray[np.uint8]]

    @classmethod
    def of(cls, block: SampleBlock, start: int) -> _Submitted:
        images = [(start + row, image) for row, image in enumerate(block.images) if image is not None]
        return cls([row for row, _ in images], [image for _, image in images])

    def collect(self, decoding: Decoder, reasons: dict[int, str]) -> None:
        faults = decoding.collect().faults
        reasons.update((self.rows[position], reason) for position, reason in faults.items())
